"""The Ray cluster: connecting to the running one or starting one here, and what it holds now.

How soon a cluster notices that a host is gone without a word (a cut cable, a crash of the whole machine) is up to its
head: with Ray's defaults five checks of up to 10 s, 3 s apart, so about a minute. A cluster that distft starts does it
in at most 11 s; one's own does, when its head is started with ``RAY_health_check_timeout_ms=3000
RAY_health_check_period_ms=500 RAY_health_check_failure_threshold=3 ray start --head``. A process that ends is noticed
at once in any case.

A head that is lost ends what runs on its cluster, unless it keeps its tables on a disk and can be started again from
them, at the same address: ``RAY_gcs_storage=rocksdb RAY_gcs_storage_path=DIR ray start --head``
(https://docs.ray.io/en/master/core/fault-tolerance/gcs.html). Then training goes on without it, as long as
driver and workers are on other hosts: ``--num-cpus 0`` keeps workers off the head. Those hosts wait a minute for it, or
as long as they are told to, ``RAY_gcs_rpc_server_reconnect_timeout_s=600 ray start --address=...``; a driver waits for
ten minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distft.config import Bounds, Job
from distft.errors import CapacityError, ClusterLost

# Set before Ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train asks its workers how they do every 2 s by default; a short job would wait for that.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# One process less to start for each group of workers: the driver asks for draining nodes itself, where it also sees
# them while no group runs, and Ray's watcher would end the group at the deadline instead of just before it.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Ray Train's controller runs in the driver (see .trainer); what it says goes to the run's logs and not to the terminal.
os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
# A lost worker is told in one line of ours, not in ten of Ray's; that Serve's controller is gone once it was asked to
# go, in none.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|Task ServeController")
# Ray's functions would start a cluster of their own where there is none, also in a thread that outlives the run.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# Workers are asked for only where there is room; what then does not start went away in between.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
# For how long a driver outlives the loss of its cluster's head, see above.
_HEADLESS_SECONDS = float(os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "600"))
#: A head that has been silent for so long is taken to be lost: a little later Ray would end the driver without a word.
LOST_SECONDS = 0.9 * _HEADLESS_SECONDS
# Ray Tune's own logs of trials and its Ctrl-C are not wanted: trials are runs, and end with a checkpoint.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints even where it is told to be silent
# For a cluster that is started here, see above.
for _name, _value in {"timeout_ms": "3000", "period_ms": "500", "failure_threshold": "3"}.items():
    os.environ.setdefault(f"RAY_health_check_{_name}", _value)
# There, too, workers have the priority of any other program, as under torchrun. With Ray's own, a niceness of 15, each
# would get a 28th of what another program gets that computes on the same core (sched(7), weights 36 and 1024).
os.environ.setdefault("RAY_worker_niceness", "0")

#: The label by which Ray marks nodes that may be taken away at short notice
#: (https://docs.ray.io/en/releases-2.60.0/ray-core/scheduling/labels.html).
MARKET = "ray.io/market-type"

_LOOK_SECONDS = 1.0
_REACH_SECONDS = 5.0


@dataclass(frozen=True)
class Node:
    """One node's resources, as Ray counts them.

    Attributes:
        name: Its address.
        resources: Amounts by name: all of them, or those that are free.
        id: Ray's id.
        labels: Ray's and the cluster's labels.
    """

    name: str
    resources: Mapping[str, float]
    id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def holds(self, need: Mapping[str, float]) -> int:
        """How many workers that each need ``need`` fit on this node."""
        counts = [int(self.resources.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount > 0]
        return min(counts, default=0)

    def describe(self, names: Mapping[str, float]) -> str:
        """``10.0.0.1: 8 CPU, 1 GPU``."""
        return f"{self.name}: " + ", ".join(f"{self.resources.get(name, 0):g} {name}" for name in names)


def live_nodes() -> list[Node]:
    """The nodes that work can be given to, with all they have: those that are about to go are left out."""
    import ray

    going = draining()
    return [
        Node(node["NodeManagerAddress"], node["Resources"], node["NodeID"], node["Labels"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in going
    ]


def free_nodes() -> list[Node]:
    """The same nodes with what is free now."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [Node(node.name, free.get(node.id, {}), node.id, node.labels) for node in live_nodes()]


def draining() -> dict[str, float | None]:
    """Nodes that are about to be taken away, by id: when, in seconds since the epoch, where that is known.

    Whoever takes a node away tells Ray's head (``ray start --block`` does on SIGTERM). Ray Train's own watcher asks the
    same way (``ray.train.v2._internal.execution.preemption``); Ray has no public function for it.
    """
    from ray._private.state import state

    return {node: milliseconds / 1000 or None for node, milliseconds in state.get_draining_nodes().items()}


def room_here(need: Mapping[str, float]) -> int:
    """How many workers there is room for now: in the placement group that this process has been lent, or on the nodes.

    A trial of a search has been lent one, which Ray fills again when a node of it is lost.
    """
    from ray.util import get_current_placement_group

    lent = get_current_placement_group()
    if lent is None:
        return room(need, free_nodes())
    return lent.bundle_count if lent.wait(1) else 0


def room(need: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """How many workers that each need ``need`` fit on these nodes."""
    return sum(node.holds(need) for node in nodes)


def selectors(workers: int, need: Mapping[str, float], nodes: Sequence[Node]) -> list[dict[str, str]] | None:
    """Labels by which rank 0, which writes the run's files, is kept off nodes that may be taken away at any time.

    Returns:
        One selector per worker, rank 0's first; None where there is nothing to choose: no node is marked as ``spot``,
        or no other has room.
    """
    spot = [node for node in nodes if node.labels.get(MARKET) == "spot"]
    if not spot or not room(need, [node for node in nodes if node not in spot]):
        return None
    return [{MARKET: "!spot"}, *({} for _ in range(workers - 1))]


def workers_of(job: Job) -> Bounds:
    """The least and the most workers that the job asks for."""
    asked = job.cluster.workers
    return asked if isinstance(asked, Bounds) else Bounds(min=asked, max=asked)


def worker_resources(job: Job, nodes: Sequence[Node]) -> dict[str, float]:
    """What one worker asks for: a GPU too, where the cluster has some and the job is silent about them."""
    wanted = dict(job.cluster.resources_per_worker)
    if "GPU" not in wanted and any(node.resources.get("GPU", 0) for node in nodes):
        wanted["GPU"] = 1.0
    return wanted


def grown(job: Job, nodes: list[Node], note: Callable[[str], None]) -> list[Node]:
    """The cluster's nodes once the least workers that the job asks for fit on them, or its patience ends.

    A cluster that scales itself starts nodes for what is asked of it
    (https://docs.ray.io/en/releases-2.60.0/cluster/running-applications/autoscaling/reference.html); one that does not
    is the same after the wait.

    Args:
        job: Says what workers need, and for how long to wait (``cluster.wait_seconds``).
        nodes: What there is now.
        note: Is told that it waits, and for what.
    """
    from ray.autoscaler.sdk import request_resources

    workers, until, asked = workers_of(job), time.monotonic() + job.cluster.wait_seconds, None
    try:
        while time.monotonic() < until and room(need := worker_resources(job, nodes), nodes) < workers.min:
            if need != asked:  # GPUs too, once the first node that comes has some
                note(f"  asked the cluster for {describe(workers.max, need)}; nodes may take {_minutes(job)} to come")
                request_resources(bundles=[need] * workers.max)
                asked = need
            time.sleep(_LOOK_SECONDS)
            nodes = live_nodes()
    finally:
        if asked is not None:
            request_resources(
                bundles=[]
            )  # else nodes would stay for ever; from now on the workers themselves hold them
    return nodes


def _minutes(job: Job) -> str:
    return f"{job.cluster.wait_seconds / 60:g} min"


def check_capacity(
    workers: Bounds, need: Mapping[str, float], nodes: Sequence[Node], key: str = "cluster.workers"
) -> None:
    """Refuses a job whose workers the cluster cannot hold all at once; they would wait for one another for ever.

    Args:
        workers: How many are asked for, at least and at most.
        need: What each needs.
        nodes: What there is.
        key: The job's key that asks for them.

    Raises:
        CapacityError: With what is asked, what each node holds, and what would fit.
    """
    fit = room(need, nodes)
    if workers.min <= fit:
        return
    least = "" if workers.min == workers.max else "at least "
    if workers.min != workers.max:
        key += ".min"
    raise CapacityError(
        f"{least}{describe(workers.min, need)} are asked for, and the cluster holds {fit} ({listed(need, nodes)})",
        where=key,
        fix=f"set {key}: {fit}, or ask for less per worker in cluster.resources_per_worker"
        if fit
        else "ask for less per worker in cluster.resources_per_worker, or join a larger cluster; one that grows by "
        "itself needs time for it: cluster.wait_seconds",
    )


def describe(workers: int, need: Mapping[str, float]) -> str:
    """``2 workers of 1 CPU, 1 GPU``."""
    each = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
    return f"{workers} worker{'' if workers == 1 else 's'} of {each}"


def listed(need: Mapping[str, float], nodes: Sequence[Node]) -> str:
    """What some nodes hold of what is needed; the first eight of them."""
    more = f"; and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
    return "; ".join(node.describe(need) for node in nodes[:8]) + more


@contextlib.contextmanager
def connected(
    address: str, *, start: bool = True, environment: Mapping[str, str] | None = None
) -> Iterator[list[Node]]:
    """Connects to a cluster (``auto``: the running one, else one started here) and leaves it at the end.

    Args:
        address: The cluster.
        start: Whether ``auto`` may start one.
        environment: Variables of all processes that this one has started on the cluster.

    Yields:
        The live nodes and their resources.

    Raises:
        CapacityError: No cluster answers at that address.
    """
    import ray

    known = None if address == "auto" and start else address
    try:
        named = _named(address)
        if named is not None and not _listens(named):
            if known is not None or os.environ.get("RAY_ADDRESS"):
                raise ConnectionError(f"nobody listens at {named}")
            known = "local"  # the one that ran here last has ended
        ray.init(
            address=known,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": dict(environment)} if environment else None,
        )
    except (OSError, ValueError) as error:
        raise CapacityError(
            f"no Ray cluster answers: {str(error).splitlines()[0]}",
            where=f"cluster.address {address!r}",
            fix="start one (ray start --head), or use cluster.address: local for one that distft starts itself",
        ) from error
    _protect_token()
    _end_log_monitor()
    lost = False
    try:
        yield live_nodes()
    except ClusterLost:  # it cannot be left
        lost = True
        raise
    finally:
        if not lost:
            ray.shutdown()


def _named(address: str) -> str | None:
    """The HOST:PORT that Ray would connect to; for ``auto`` that of the cluster that was started here last.

    ``ray start`` writes it into a file, and ``ray stop`` alone takes it away.
    """
    from ray._private.utils import read_ray_address

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or read_ray_address() or ""
    return address if re.fullmatch(r"[^/]+:\d+", address) else None


def _listens(address: str) -> bool:
    """Whether somebody listens there, which Ray would try for minutes.

    Raises:
        OSError: It cannot be told: the address is out of reach.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except ConnectionRefusedError:
        return False
    return True


def joined() -> str | None:
    """Which running cluster this process is connected to, for people; None where it was started here."""
    import ray
    from ray._private.worker import global_worker

    if global_worker.node is None or global_worker.node.is_head():
        return None
    nodes = live_nodes()
    cpus = sum(node.resources.get("CPU", 0) for node in nodes)
    count = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
    return f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}: {count}, {cpus:g} CPU"


def _end_log_monitor() -> None:
    """Of a cluster that was started here: it reads all logs ten times a second to print them, which is not wanted.

    On two cores that workers fill it takes 0.4 % of their time. Remove when ``ray.init`` starts none where
    ``log_to_driver`` is false (2.60 does).
    """
    from ray._private.worker import global_worker

    if global_worker.node is not None and global_worker.node.is_head():
        global_worker.node.kill_log_monitor(check_alive=False)


def _protect_token() -> None:
    """Ray 2.60 writes its token file readable by everyone (mode 0644); whoever holds the token runs code here.

    Remove when Ray writes it with mode 0600.
    """
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)

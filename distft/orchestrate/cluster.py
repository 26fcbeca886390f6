"""The Ray cluster: connecting to the running one or starting one here, and what it holds."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from distft.config import Job
from distft.errors import CapacityError

# Set before Ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray Train asks its workers how they do every 2 s by default; a short job would wait for that.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# One process less to start on each run. To be removed once preemption notices are acted on.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@dataclass(frozen=True)
class Node:
    """One node's resources, as Ray counts them."""

    name: str
    resources: Mapping[str, float]

    def holds(self, need: Mapping[str, float]) -> int:
        """How many workers that each need ``need`` fit on this node."""
        counts = [int(self.resources.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount > 0]
        return min(counts, default=0)

    def describe(self, names: Mapping[str, float]) -> str:
        """``10.0.0.1: 8 CPU, 1 GPU``."""
        return f"{self.name}: " + ", ".join(f"{self.resources.get(name, 0):g} {name}" for name in names)


def workers_of(job: Job) -> int:
    """How many workers the job asks for."""
    assert isinstance(job.cluster.workers, int)  # a range is refused as not built yet
    return job.cluster.workers


def worker_resources(job: Job, nodes: list[Node]) -> dict[str, float]:
    """What one worker asks for: a GPU too, where the cluster has some and the job is silent about them."""
    wanted = dict(job.cluster.resources_per_worker)
    if "GPU" not in wanted and any(node.resources.get("GPU", 0) for node in nodes):
        wanted["GPU"] = 1.0
    return wanted


def check_capacity(workers: int, need: Mapping[str, float], nodes: list[Node]) -> None:
    """Refuses a job whose workers the cluster cannot hold all at once; they would wait for one another for ever.

    Raises:
        CapacityError: With what is asked, what each node holds, and what would fit.
    """
    fit = sum(node.holds(need) for node in nodes)
    if workers <= fit:
        return
    asked = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
    listed = "; ".join(node.describe(need) for node in nodes[:8])
    more = f"; and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
    raise CapacityError(
        f"{workers} workers of {asked} are asked for, and the cluster holds {fit} ({listed}{more})",
        where="cluster.workers",
        fix=f"set cluster.workers: {fit}, or ask for less per worker in cluster.resources_per_worker"
        if fit
        else "ask for less per worker in cluster.resources_per_worker, or join a larger cluster",
    )


@contextlib.contextmanager
def connected(job: Job) -> Iterator[list[Node]]:
    """Connects to the job's cluster (``auto``: the running one, else one started here) and leaves it at the end.

    Yields:
        The live nodes and their resources.

    Raises:
        CapacityError: No cluster answers at the job's address.
    """
    import ray

    # Ray's start is waiting for other processes; the imports that training needs next take the same seconds.
    threading.Thread(target=importlib.import_module, args=["ray.train.torch"], daemon=True).start()
    address = None if job.cluster.address == "auto" else job.cluster.address
    try:
        ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise CapacityError(
            f"no Ray cluster answers: {str(error).splitlines()[0]}",
            where=f"cluster.address {job.cluster.address!r}",
            fix="start one (ray start --head), or use cluster.address: local for one that distft starts itself",
        ) from error
    _protect_token()
    try:
        yield [Node(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _protect_token() -> None:
    """Ray 2.60 writes its token file readable by everyone (mode 0644); whoever holds the token runs code here.

    Remove when Ray writes it with mode 0600.
    """
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)

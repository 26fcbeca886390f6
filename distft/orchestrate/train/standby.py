"""Processes that are ready for the next group of workers: Ray has started them, and the libraries are loaded.

After a failure a group would wait for both, on a small machine most of the time until it trains again. A process that
stands by takes its memory (400 MB) and no CPU; Ray ends it with the driver. Where one cannot be had, Ray starts a
process when the group is, as ever. Imported where Ray is there already.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from grpc import RpcError
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.utils import get_runtime_env_info
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.runtime_env import RuntimeEnv

from distft.orchestrate.cluster import Node, free_nodes
from distft.orchestrate.train.places import Place

#: How long Ray keeps a process that nobody takes; it would end one that is idle after a second.
_KEPT_SECONDS = 7 * 24 * 3600
_ANSWER_SECONDS = 10.0


def load() -> None:
    """What Ray calls in such a process as it starts."""
    import distft.train.preloaded  # noqa: F401


class Standby:
    """The processes that stand by for a run.

    Args:
        need: What a worker holds.
        threads: Threads that it computes with on a CPU.
    """

    def __init__(self, need: Mapping[str, float], threads: int) -> None:
        self._need = need
        # Libraries that look for GPUs as they are imported would see all of the node's, before Ray has said which are
        # this worker's. So there they are not loaded.
        hook = {} if need.get("GPU", 0) > 0 else {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{load.__name__}"}
        # The number of threads is read when torch is loaded.
        self._environment = {"env_vars": {**hook, "OMP_NUM_THREADS": str(threads)}}
        self._ready: Counter[str] = Counter()  # by node

    def take(self, workers: int, nodes: Sequence[Node]) -> dict[str, Any] | None:
        """The runtime environment that makes a group's workers of those that stand by; None where they are too few.

        Args:
            workers: How many the group has.
            nodes: The nodes that are alive.
        """
        if sum(self._ready[node.id] for node in nodes) < workers:
            return None
        self._ready.clear()  # some may be left; Ray gives them to a later group
        return self._environment

    def fill(self, places: Sequence[Place]) -> None:
        """Has as many processes stand by as a group has workers, node by node; does not wait for them.

        One other node with room has some too: where a node is lost, its workers go there.
        """
        wanted = Counter(place.node for place in places)
        others = (node for node in free_nodes() if node.id not in wanted)
        if (spare := next((node for node in others if node.holds(self._need)), None)) is not None:
            wanted[spare.id] = min(spare.holds(self._need), max(wanted.values(), default=0))
        addresses = {
            node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            for node in ray.nodes()
            if node["Alive"]
        }
        for node, count in (wanted - self._ready).items():
            with contextlib.suppress(KeyError, RpcError):  # it is gone, or does not answer: no run needs them
                _start(addresses[node], count, self._environment)
                self._ready[node] += count


def _start(address: str, count: int, environment: Mapping[str, Any]) -> None:
    """Has a node start processes of this job that wait for work.

    Ray does so itself for a job's first tasks (``NodeManagerService.PrestartWorkers`` in ``node_manager.proto``); it
    has no function for it.
    """
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).binary(),
        keep_alive_duration_secs=_KEPT_SECONDS,
        num_workers=count,
    )
    request.runtime_env_info.CopyFrom(get_runtime_env_info(RuntimeEnv(**environment)))
    with init_grpc_channel(address) as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_SECONDS)

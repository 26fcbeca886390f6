"""Before workers start: whether the job fits on the cluster's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distft.config import Job
from distft.errors import DataError
from distft.model.shape import read_shape
from distft.orchestrate.cluster import Node, worker_resources, workers_of
from distft.plan.choices import choose
from distft.plan.devices import known
from distft.plan.hardware import Hardware, host_memory_bytes

#: What Ray calls a node's kind of GPU among its resources, before the kind's name.
_ACCELERATOR = "accelerator_type:"


def check_fit(job: Job, nodes: Sequence[Node]) -> None:
    """Refuses a job that fits on the cluster in no way that it leaves open; the workers will decide which way.

    Nothing is refused where the cluster does not say what its devices are, or the model cannot be read (whoever loads
    it tells why).

    Raises:
        CapacityError: With figures, and what would make it fit.
    """
    import ray

    need = worker_resources(job, nodes)
    working = [node for node in nodes if node.holds(need)]
    found = hardware_of(working, need, ray.get_runtime_context().get_node_id())
    if found is None:
        return
    try:
        shape = read_shape(job.model, job.folder)
    except DataError:
        return
    workers = min(workers_of(job).max, sum(node.holds(need) for node in working))
    per_node = -(-workers // len(working))  # at best; the workers know where they are
    choose(job, workers, found, shape=shape, workers_per_node=per_node)


def hardware_of(nodes: Sequence[Node], need: Mapping[str, float], own: str) -> Hardware | None:
    """What the node with least memory has, from what Ray tells of it; None where that is not known.

    Ray's ``memory`` and ``object_store_memory`` are, together, what was free when a node started; of this process's
    own node all of its memory is counted. A CPU is taken to be fast at bf16, which needs less.
    """
    if not nodes:
        return None
    if not need.get("GPU"):
        least = min(host_memory_bytes() if node.id == own else _memory(node) for node in nodes)
        return Hardware("cpu", "CPU", True, least) if least else None
    kinds = {name.removeprefix(_ACCELERATOR) for node in nodes for name in node.resources if _ACCELERATOR in name}
    devices = [known(kind) for kind in kinds]
    if not devices or any(device is None for device in devices):
        return None
    return Hardware.of(min((one for one in devices if one is not None), key=lambda one: one.memory_bytes))


def _memory(node: Node) -> int:
    return int(node.resources.get("memory", 0) + node.resources.get("object_store_memory", 0))

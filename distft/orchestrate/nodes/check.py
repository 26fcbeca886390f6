"""Before a run: whether the nodes that work may be given to can work together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distft.config import Job
from distft.errors import CapacityError
from distft.orchestrate.cluster import Node
from distft.orchestrate.listener import Listener
from distft.runs import Run
from distft.world import cache_folder


def check_nodes(job: Job, run: Run, nodes: Sequence[Node], listener: Listener) -> dict[str, Any]:
    """Refuses a cluster whose nodes cannot work together; where all work is on the driver's own node, asks nobody.

    Returns:
        What the nodes say, for ``environment.json``; nothing where nobody was asked.

    Raises:
        CapacityError: Each node that is in the way, why, and what to do about it.
    """
    import ray

    working = [node for node in nodes if node.resources.get("CPU") or node.resources.get("GPU")]
    if {node.id for node in working} <= {ray.get_runtime_context().get_node_id()}:
        return {}
    from distft.orchestrate.nodes.findings import describe, judge
    from distft.orchestrate.nodes.survey import survey

    heard = survey(working, places_of(job, run))
    found = judge(heard.driver, heard.reports)
    problems = [finding for finding in found if finding.level == "problem"]
    if problems:
        raise CapacityError("\n  ".join(["these nodes cannot run the job together:", *map(str, problems)]))
    listener.note(f"  {describe(heard.reports, heard.network)}")
    for finding in found:
        listener.note(f"  {finding}")
    return heard.as_json()


def places_of(job: Job, run: Run) -> dict[str, str]:
    """What all nodes must see, each with what sets it."""
    places = {str(run.folder.parent): "--runs or DISTFT_RUNS", str(cache_folder().resolve()): "DISTFT_CACHE"}
    storage = job.checkpoint.storage
    if storage is not None:
        address = storage.rstrip("/") if "://" in storage else str((job.folder / storage).resolve())
        places.setdefault(address, "checkpoint.storage")
    return places

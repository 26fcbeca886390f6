"""Where each rank runs: written down by the rank itself, so that the driver can look at it or end it, on any node."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.runs import Run, read_json, write_json

#: How long a node may take to say how its ranks are; it starts a process for that where none is idle, which takes 10 s
#: on a machine whose cores are all at work. A node that Ray knows to be gone is not waited for.
ANSWER_SECONDS = 15.0


@dataclass(frozen=True)
class Place:
    """Where one rank runs.

    Attributes:
        rank: Which.
        attempt: The group of workers that it is of: when that was started, in seconds since the epoch.
        pid: Its process.
        started: When that began, in clock ticks since its node booted: a pid alone may be another's by now.
        node: Ray's id of the node.
        host: The node's address.
    """

    rank: int
    attempt: float
    pid: int
    started: int
    node: str
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def write_place(run: Run, rank: int, attempt: float) -> None:
    """Writes down where this process is; a Ray Train worker calls it."""
    import ray

    context = ray.get_runtime_context()
    place = Place(
        rank,
        attempt,
        os.getpid(),
        _process(os.getpid())[1],
        context.get_node_id(),
        ray.util.get_node_ip_address(),
    )
    write_json(run.logs / f"rank-{rank}.json", asdict(place))


def read_places(run: Run, attempt: float) -> list[Place]:
    """Where the ranks of a group of workers are, as far as they have said so."""
    found = []
    for path in run.logs.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            place = Place(**read_json(path))
            if place.attempt == attempt:
                found.append(place)
    return sorted(found, key=lambda place: place.rank)


def states(places: Sequence[Place], *, kill: bool = False) -> dict[int, str]:
    """How each rank's process is: Linux' letter for it, ``gone``, or ``unknown`` where its node does not answer.

    Args:
        places: The ranks.
        kill: End them too (SIGKILL, which also ends a process that is stopped).
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(_states)
    here = ray.get_runtime_context().get_node_id()
    known = {place.rank: "unknown" for place in places}
    refs = {}
    for node in {place.node for place in places}:
        mine = [place for place in places if place.node == node]
        processes = [(place.pid, place.started) for place in mine]
        if node == here:  # a task would be one more process to start
            known |= _by_rank(mine, _states(processes, kill))
            continue
        pinned = remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        refs[pinned.remote(processes, kill)] = mine
    answered, _ = ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_SECONDS) if refs else ([], [])
    for ref in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # the node went while it was asked
            known |= _by_rank(refs[ref], ray.get(ref))
    return known


def _by_rank(places: Sequence[Place], states: Sequence[str]) -> dict[int, str]:
    return {place.rank: state for place, state in zip(places, states, strict=True)}


def group_name(run: Run, attempt: float) -> str:
    """What Ray knows a group of workers by, and its placement group."""
    return f"{run.name}-{attempt}"


def clear(run: Run, attempt: float) -> None:
    """Makes sure that nothing is left of a group of workers: no process that could still write, no resources held.

    Ray Train ends its workers itself, as far as it can reach them, but for those that fail while it starts them.
    """
    from ray._private.worker import global_worker
    from ray.util import get_placement_group, remove_placement_group

    states(read_places(run, attempt), kill=True)
    for actor in _own_actors():  # as ray.kill does, which wants the actor's handle
        global_worker.core_worker.kill_actor(actor, True)
    with contextlib.suppress(ValueError):  # it is gone
        remove_placement_group(get_placement_group(group_name(run, attempt)))


def _own_actors() -> Iterator[Any]:
    """The ids of the living actors that this process has started; a search's other trials have owners of their own."""
    import ray
    from ray._private.state import state
    from ray._private.worker import global_worker
    from ray.core.generated.gcs_pb2 import ActorTableData

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for content in state._connect_and_get_accessor().get_actor_table(job, None):
        actor = ActorTableData.FromString(content)
        mine = actor.owner_address.worker_id == global_worker.worker_id
        if mine and not actor.is_detached and actor.state != ActorTableData.DEAD:
            yield ray.ActorID(actor.actor_id)


def _states(processes: list[tuple[int, int]], kill: bool) -> list[str]:
    """What a node says of its own processes."""
    found = []
    for pid, started in processes:
        state, began = _process(pid)
        alive = began == started
        if alive and kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        found.append(state if alive else "gone")
    return found


def _process(pid: int) -> tuple[str, int]:
    """A process's state and start (fields 3 and 22 of /proc/PID/stat, see proc(5)); 0 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "gone", 0
    return fields[0], int(fields[19])

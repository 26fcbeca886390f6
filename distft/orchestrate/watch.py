"""What the driver looks for beside a group of workers at work, and asks of it in return."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from distft.orchestrate import cluster
from distft.orchestrate.places import Place, read_places
from distft.runs import Run, StopRequest

#: Of two requests the later in this list stands: who stops for good needs not stop to grow.
_PRECEDENCE = ("resize", "preempted", "interrupt")

#: How often the cluster is asked for nodes that are about to go, and for room. New room must be there twice.
DRAIN_SECONDS, ROOM_SECONDS = 1.0, 5.0

#: How long a node is taken to stay where its notice does not say.
NOTICE_SECONDS = 30.0


class Requests:
    """What a group of workers is asked to do: the most pressing of all requests.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._made: StopRequest | None = None

    def ask(self, request: StopRequest) -> None:
        """Asks, unless something at least as pressing was asked before."""
        before = -1 if self._made is None else _PRECEDENCE.index(self._made.reason)
        sooner = self._made is not None and (request.deadline or 0.0) < (self._made.deadline or 0.0)
        level = _PRECEDENCE.index(request.reason)
        if level > before or (level == before and sooner):
            self._made = request
            self._run.ask(request)

    def forget(self) -> None:
        """For the next group of workers nothing is asked."""
        self._made = None
        self._run.stop_request.unlink(missing_ok=True)


class Watch:
    """Watches the cluster for a group of workers: for nodes that go, and for room to grow.

    Args:
        run: The run.
        attempt: The group: when it was started.
        need: What a worker needs.
        workers: How many it has.
        wanted: How many workers the job would like to have.
        requests: Where what is found is asked.
    """

    def __init__(
        self, run: Run, attempt: float, need: Mapping[str, float], workers: int, wanted: int, requests: Requests
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._need = need
        self._workers = workers
        self._wanted = wanted
        self._requests = requests
        self._room_seen = False
        self._look_for_drains = _every(DRAIN_SECONDS)
        self._look_for_room = _every(ROOM_SECONDS)
        self.preempted: set[str] = set()  # nodes of the group that are about to go, or went

    def look(self) -> None:
        """Looks, where it is time to, and asks."""
        if self._look_for_drains():
            self._drains()
        if self._workers < self._wanted and self._look_for_room():
            # Before all ranks run, the room that they are about to take is free.
            room = len(self._places()) == self._workers and cluster.room(self._need, cluster.free_nodes()) > 0
            if room and self._room_seen:
                self._requests.ask(StopRequest("resize"))
            self._room_seen = room

    def _places(self) -> list[Place]:
        return read_places(self._run, self._attempt)

    def _drains(self) -> None:
        going = cluster.draining()
        if not going:
            return
        for node in {place.node for place in self._places()} & going.keys():
            if node not in self.preempted:
                self.preempted.add(node)
                self._requests.ask(StopRequest("preempted", going[node] or time.time() + NOTICE_SECONDS))


def _every(seconds: float) -> Callable[[], bool]:
    """Whether so long has passed since it last said so; the first time it has not."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due

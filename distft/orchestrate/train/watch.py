"""What the driver looks for beside a group of workers at work, and asks of it in return."""

from __future__ import annotations

import time
from collections.abc import Mapping

from distft.orchestrate import cluster
from distft.orchestrate.asking import Question
from distft.orchestrate.train.places import Place, read_places
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
        together: How many more it can use at least: those that share rows come as a group.
        requests: Where what is found is asked.
    """

    def __init__(
        self,
        run: Run,
        attempt: float,
        need: Mapping[str, float],
        workers: int,
        wanted: int,
        together: int,
        requests: Requests,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._workers = workers
        self._wanted = wanted
        self._together = together
        self._requests = requests
        self._room_seen = False
        self._going = Question(cluster.draining, DRAIN_SECONDS)
        self._room = Question(lambda: cluster.room(need, cluster.free_nodes()), ROOM_SECONDS)
        self.preempted: set[str] = set()  # nodes of the group that are about to go, or went

    def look(self) -> None:
        """Looks at what the cluster answered, and asks."""
        for node, deadline in (self._going.answer() or {}).items():
            if node not in self.preempted and node in {place.node for place in self._places()}:
                self.preempted.add(node)
                self._requests.ask(StopRequest("preempted", deadline or time.time() + NOTICE_SECONDS))
        slots = self._room.answer() if self._workers < self._wanted else None
        if slots is not None:
            # Before all ranks run, the room that they are about to take is free.
            room = slots >= self._together and len(self._places()) == self._workers
            if room and self._room_seen:
                self._requests.ask(StopRequest("resize"))
            self._room_seen = room

    @property
    def silent_seconds(self) -> float:
        """For how long the cluster's head has not answered."""
        return self._going.waiting_seconds

    def _places(self) -> list[Place]:
        return read_places(self._run, self._attempt)

"""The training stage: one group of workers after the other until the run is done, and a person's eyes on it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

from distft.config import Job
from distft.errors import CapacityError, ClusterLost, Interrupted, RunError
from distft.ledger.goodput import goodput
from distft.orchestrate import cluster
from distft.orchestrate.asking import in_background
from distft.orchestrate.cluster import Node, worker_resources, workers_of
from distft.orchestrate.data import Data
from distft.orchestrate.listener import Listener
from distft.orchestrate.signals import Asked, stopping
from distft.orchestrate.train.meters import Meters
from distft.orchestrate.train.places import clear, read_places, states
from distft.orchestrate.train.policy import Failure, GiveUp, HalveMicroBatch, Kind, decide
from distft.orchestrate.train.stall import STACK_SECONDS, StallClock, explain
from distft.orchestrate.train.watch import Requests, Watch
from distft.runs import (
    ASIDES,
    Run,
    StopRequest,
    append_line,
    event,
    is_restart,
    read_json,
    read_lines,
    read_new_lines,
    update_result,
    write_json,
)
from distft.train import Attempt, Outcome
from distft.world import cache_folder

#: How long the driver sleeps between two looks at everything.
LOOK_SECONDS = 0.25

#: How long a run waits for the workers that it needs at least: as long as a cloud may take to bring a node back.
ROOM_SECONDS = 600.0

#: How long the cluster's head may take to answer before a person is told.
SILENT_SECONDS = 10.0

#: How long a group of workers may take to end, once it is told to. A run that is broken off leaves Ray next, which
#: crashes where another thread still uses it.
ENDING_SECONDS = 20.0

#: How long a run waits for more than it needs at least, where others hold it: until what was just ended has let go.
SETTLE_SECONDS = 3.0


def train(job: Job, run: Run, data: Data, nodes: list[Node], listener: Listener) -> None:
    """Trains, from the newest checkpoint where there is one; the listener hears each line of the metrics.

    Raises:
        Interrupted: Somebody asked the run to stop (Ctrl-C); its checkpoint is written.
        RunError: It failed, and starting again would not help, or was done often enough.
        CapacityError: The workers that it needs at least are not to be had.
    """
    listener.stage("train")
    with stopping(listener.note) as asked:
        outcome = Training(job, run, data, worker_resources(job, nodes), listener, asked).run()
    lines = list(read_lines(run.metrics))
    spent = goodput(lines)
    update_result(
        run,
        step=outcome.step,
        best_step=outcome.best_step,
        metrics=outcome.metrics,
        restarts=sum(map(is_restart, lines)),
        goodput={
            "share": round(spent.share, 4),
            "seconds": {name: round(part, 3) for name, part in spent.parts.items()},
        },
        paths=_paths(run),
    )
    if outcome.stopped == "interrupt":
        raise _interrupted(run, f"stopped at step {outcome.step:,}; its checkpoint is written")


class Training:
    """A run's groups of workers, one after the other.

    Args:
        job: The job.
        run: The run.
        data: What it works on.
        need: What one worker needs.
        listener: Who hears of it.
        asked: Whether somebody asks to stop.
        rungs: Where it is compared with others, as a trial of a search; see :class:`~distft.train.Attempt`.
        until: The rung at which its turn ends, where it is not to go on to its end.
    """

    def __init__(
        self,
        job: Job,
        run: Run,
        data: Data,
        need: dict[str, float],
        listener: Listener,
        asked: Asked,
        rungs: tuple[int, ...] | None = None,
        until: int | None = None,
    ) -> None:
        from distft.orchestrate.train.standby import Standby

        self._job, self._run, self._data, self._need = job, run, data, need
        self._listener, self._asked, self._rungs, self._until = listener, asked, rungs, until
        self._bounds, self._together = workers_of(job), job.train.sequence_parallel_size
        self._requests = Requests(run)
        self._meters = Meters(run, listener.note)
        self._offset = run.metrics.stat().st_size if run.metrics.exists() else 0
        self._step: int | None = None  # the last one of this group of workers
        self._begun: int | None = None  # the one that it began after
        self._limit: int | None = None  # rows of a pass that memory holds, once that is known
        self._head_silent, self._head_lost = False, False
        self._threads = job.cluster.threads
        # A trial of a search is short, and there are many: none waits for it in idle processes.
        self._standby = Standby(need, self._threads) if rungs is None else None
        self._readied: float | None = None  # the group of workers that others stand by for

    def run(self) -> Outcome:
        """Starts groups of workers until one ends as it should, or it is no use.

        Raises:
            DistftError: See :func:`train`.
        """
        history: list[Failure] = []
        while True:
            workers = self._await_room()
            try:
                ended = self._one_group(workers)
            finally:
                self._requests.forget()
            if self._head_lost:
                raise _headless(self._run)
            if isinstance(ended, Outcome):
                if ended.stopped in (None, "turn"):
                    return ended
                if self._asked:
                    return dataclasses.replace(ended, stopped="interrupt")
                if ended.stopped == "resize":
                    continue
                ended = Failure("preempted", "its node was about to be taken away", step=ended.step)
            elif self._asked:
                raise _interrupted(self._run, f"stopped; its workers ended without a checkpoint: {ended}")
            self._go_on(ended, history)
            history.append(ended)

    def _go_on(self, failure: Failure, history: Sequence[Failure]) -> None:
        """Makes ready for the next group of workers.

        Raises:
            RunError: There is to be none.
        """
        decided = read_json(self._run.resolved)["decisions"]  # by the workers, as they begin
        size = decided["train.micro_batch_size"]["value"] if decided else 1
        after = decide(failure, history, max_failures=self._job.cluster.max_failures, micro_batch_size=size)
        if isinstance(after, GiveUp):
            raise RunError(after.reason, fix=f"{after.fix}; the workers' logs are in {self._run.logs}")
        text = str(failure)
        if isinstance(after, HalveMicroBatch):
            self._limit = after.rows
            text += f"; {after.rows} rows a pass instead of {size} from here on, as many rows a step as before"
        if not (failure.kind == "preempted" and self._told_last("preempted")):  # the workers said it themselves
            self._tell(failure.kind, text)

    def _one_group(self, workers: int) -> Outcome | Failure:
        """Runs one group of workers to its end, with an eye on it and on the cluster."""
        from distft.orchestrate.train.fit import Assignment, fit

        nodes = cluster.free_nodes()
        stall = self._job.cluster.stall_seconds
        set_seconds = None if stall == "auto" else stall
        began = time.time()
        write_json(self._run.group, began)
        attempt = Attempt(self._bounds.max, self._limit, began, set_seconds, self._rungs, self._until)
        data = self._data
        assignment = Assignment(
            self._job, self._run, data.prepared, data.model, cache_folder().resolve(), self._threads, attempt
        )
        selectors = cluster.selectors(workers, self._need, nodes)
        environment = self._standby.take(workers, nodes) if self._standby else None
        watch = Watch(self._run, began, self._need, workers, self._bounds.max, self._together, self._requests)
        clock = StallClock(self._run, set_seconds)
        self._step, self._begun, stalled = None, None, None
        # Ray Train takes Ctrl-C for itself where it has the main thread.
        fitting = in_background(lambda: fit(assignment, workers, self._need, selectors, environment))
        try:
            while not fitting.done():
                time.sleep(LOOK_SECONDS)
                self._hear(clock)
                self._make_ready(began)
                if self._asked:
                    if self._step is None or self._asked.at_once:  # nothing that a checkpoint would keep
                        raise _interrupted(self._run, "stopped before the workers' first step")
                    self._requests.ask(StopRequest("interrupt"))
                watch.look()
                self._mind_head(watch)
                seconds = clock.stalled_seconds()
                settled = stalled is not None or self._head_silent  # nodes cannot be asked without the head
                if seconds is not None and not settled and not fitting.done():
                    stalled = self._end_stalled(seconds, began)
        finally:  # also where a person does not want to wait
            self._end(fitting, began)
        while self._head_silent and not self._head_lost:  # what comes next needs it
            if self._asked:
                raise _interrupted(self._run, "stopped while its cluster's head did not answer")
            time.sleep(LOOK_SECONDS)
            watch.look()
            self._mind_head(watch)
        self._hear(clock)
        ended = fitting.result()
        if isinstance(ended, Outcome):
            return ended
        kind: Kind = "preempted" if ended.kind == "lost" and watch.preempted else ended.kind
        step = self._begun if self._step is None else self._step
        return dataclasses.replace(stalled or dataclasses.replace(ended, kind=kind), step=step)

    def _make_ready(self, began: float) -> None:
        """Has processes stand by for the next group of workers, once this one trains."""
        if self._standby and self._step is not None and self._readied != began:
            self._readied = began
            standby = self._standby
            in_background(lambda: standby.fill(read_places(self._run, began)))

    def _mind_head(self, watch: Watch) -> None:
        """Says that the cluster's head has fallen silent, and that it is back; where it is lost, workers are to stop.

        Raises:
            ClusterLost: They do not.
        """
        silent = watch.silent_seconds > SILENT_SECONDS
        if watch.silent_seconds > cluster.LOST_SECONDS:
            self._head_lost = True
            self._requests.ask(StopRequest("interrupt"))
        if watch.silent_seconds > cluster.LOST_SECONDS + ENDING_SECONDS:
            raise _headless(self._run)
        if silent != self._head_silent:
            self._head_silent = silent
            said = "does not answer; the workers go on without it" if silent else "answers again"
            self._listener.note(f"  the cluster's head {said}")

    def _end(self, fitting: Future[Outcome | Failure], began: float) -> None:
        """Leaves nothing of a group of workers, however far its start has come."""
        until, ended = time.monotonic() + ENDING_SECONDS, False
        while not ended and time.monotonic() < until:
            ended = fitting.done()
            wait([in_background(lambda: clear(self._run, began))], until - time.monotonic())
            wait([fitting], LOOK_SECONDS)

    def _end_stalled(self, seconds: float, began: float) -> Failure:
        """Finds out why training stands still, and ends the workers."""
        time.sleep(STACK_SECONDS)
        places = read_places(self._run, began)
        text = explain(seconds, self._step, places, states(places), self._run)
        states(places, kill=True)
        return Failure("stalled", text)

    def _await_room(self) -> int:
        """Waits until there is room for as many workers as the job needs at least.

        Returns:
            How many there is room for, at most as many as the job wants.

        Raises:
            CapacityError: There is none for too long.
            Interrupted: Somebody asked to stop.
        """
        began, told = time.monotonic(), False
        while True:
            live = cluster.live_nodes()
            free = self._usable(cluster.room_here(self._need))
            waited = time.monotonic() - began
            could = self._usable(cluster.room(self._need, live))
            if free >= self._bounds.min and (free >= could or waited > SETTLE_SECONDS):
                return free
            if self._asked:
                raise _interrupted(self._run, "stopped while waiting for workers")
            asked = cluster.describe(self._bounds.min, self._need)
            if waited > ROOM_SECONDS:
                raise CapacityError(
                    f"waited {ROOM_SECONDS / 60:.0f} min for room for {asked}; there is room for {free}",
                    where="cluster.workers",
                    fix=f"go on with --resume --name {self._run.name} when it is there, or with fewer workers",
                )
            if waited > SETTLE_SECONDS and not told:
                told = True
                holds = cluster.listed(self._need, live) or "no node"
                self._listener.note(f"  waiting for room for {asked}; there is room for {free} of them ({holds})")
            time.sleep(LOOK_SECONDS)

    def _usable(self, room: int) -> int:
        """How many workers the job takes of those that there is room for: whole groups, where they share rows."""
        most = min(room, self._bounds.max)
        return most - most % self._together

    def _hear(self, clock: StallClock) -> None:
        """Passes on the new lines of the metrics."""
        records, self._offset = read_new_lines(self._run.metrics, self._offset)
        for record in records:
            clock.record(record)
            if record["kind"] == "train":
                self._step = record["step"]
            elif "workers" in record:
                self._begun = record["step"]
            self._listener.record(record)
            self._meters.record(record)

    def _tell(self, kind: Kind, text: str) -> None:
        """Records a failure as an event, which the listener hears with the next lines."""
        name = "failed" if kind in ("error", "start_timeout") else kind
        append_line(self._run.metrics, event(name, self._step or 0, text))

    def _told_last(self, name: str) -> bool:
        lines = read_lines(self._run.metrics)
        events = [line for line in lines if line["kind"] == "event" and line["event"] not in ASIDES]
        return bool(events) and events[-1]["event"] == name


def _interrupted(run: Run, what: str) -> Interrupted:
    return Interrupted(what, fix=f"go on with the same command and --resume --name {run.name}")


def _headless(run: Run) -> ClusterLost:
    return ClusterLost(
        f"the cluster's head has not answered for {cluster.LOST_SECONDS:.0f} s",
        fix=f"start a cluster, and go on with the same command and --resume --name {run.name}",
    )


def _paths(run: Run) -> dict[str, str]:
    return {
        "folder": str(run.folder),
        "metrics": str(run.metrics),
        "checkpoints": str(run.checkpoints),
        "export": str(run.export),
        "logs": str(run.logs),
    }

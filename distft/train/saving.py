"""When training saves, and what it says of it; how a checkpoint is written is the checkpoint room's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

from distft.checkpoint import Saver, State
from distft.errors import CapacityError, CheckpointError
from distft.runs import event
from distft.train.progress import Progress
from distft.train.reporter import Reporter


class Saving:
    """Saves beside training, one checkpoint at a time; every rank calls every method equally often.

    A checkpoint that cannot be written does not end training: the ones before it are kept, and the next is tried.

    Args:
        saver: Writes them.
        state: The run at step 0.
        probe: The loss that a checkpoint is known by (:func:`distft.train.resume.probe_loss`).
        reporter: Who hears of it.
    """

    def __init__(self, saver: Saver, state: State, probe: Callable[[], float | None], reporter: Reporter) -> None:
        self._saver = saver
        self._state = state
        self._probe = probe
        self._reporter = reporter
        self._step = 0
        self._blocking_seconds = 0.0

    @property
    def seconds(self) -> float:
        """How long the last save took, from its beginning to COMPLETE."""
        return self._saver.seconds

    @property
    def written(self) -> bool:
        """Whether a save is under way that is complete as far as this rank knows."""
        return self._saver.pending and self._saver.written

    def begin(self, progress: Progress) -> None:
        """Has the state written beside the next steps."""
        self.settle()
        try:
            self._begin(progress)
        except (CapacityError, CheckpointError) as error:
            self._failed(error)

    def hold(self) -> float:
        """Sees to it that an update may come next; returns for how many seconds that takes."""
        began = time.perf_counter()
        self._saver.hold()
        waited = time.perf_counter() - began
        self._blocking_seconds += waited
        return waited

    def look(self, *, everywhere: bool) -> None:
        """Ends the save under way once it is complete."""
        if self._saver.pending and everywhere:
            self.settle()

    def save(self, progress: Progress) -> None:
        """Saves, and waits for it.

        Raises:
            CapacityError: The budget or the disk cannot hold it.
            CheckpointError: It cannot be written for another reason.
        """
        self.settle()
        self._begin(progress)
        self._finish()

    def _begin(self, progress: Progress) -> None:
        began, self._step = time.perf_counter(), progress.step
        saved = {**asdict(progress), "skipped_steps": list(progress.skipped_steps)}
        self._saver.begin(replace(self._state, **saved, probe_loss=self._probe()))
        self._blocking_seconds = time.perf_counter() - began

    def settle(self) -> None:
        """Ends the save under way, waiting for what is not written yet."""
        if self._saver.pending:
            try:
                self._finish()
            except (CapacityError, CheckpointError) as error:
                self._failed(error)

    def _finish(self) -> None:
        waiting = time.perf_counter()
        checkpoint = self._saver.finish()
        facts = {
            "bytes": checkpoint.bytes,
            "blocking_seconds": self._blocking_seconds + time.perf_counter() - waiting,
            "write_seconds": self.seconds,
        }
        what = f"{checkpoint.bytes:,} bytes in {checkpoint.name}"
        self._reporter.event({**event("checkpoint", self._step, what), **facts})

    def _failed(self, error: Exception) -> None:
        self._reporter.event(event("checkpoint_failed", self._step, f"{error}; training goes on"))

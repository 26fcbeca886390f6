"""What training tells: the protocol, and the reporter that writes the run's files and tells its trackers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from distft.log import Warned
from distft.runs import Run, append_line, event
from distft.train.trackers import Follower, close_all

Record = dict[str, Any]


class Reporter(Protocol):
    """Hears every record, on every rank, in the same order: the lines of ``metrics.jsonl``."""

    def train(self, record: Record) -> None:
        """A step was made."""
        ...

    def validation(self, record: Record) -> None:
        """The validation split was scored."""
        ...

    def event(self, record: Record) -> None:
        """Something happened."""
        ...

    def row_losses(self, first: int, losses: npt.NDArray[np.float64]) -> None:
        """The loss sums of a step's rows, (rows,), of which so many rows came before over the whole run."""
        ...


class FileReporter:
    """Writes ``metrics.jsonl``, and tells trackers; on rank 0 alone.

    Args:
        run: The run that is reported.
        is_main: Whether this is rank 0; the others write nothing.
        trackers: Who else hears of it.
        warned: What libraries warn of, which a person is told.
    """

    def __init__(
        self, run: Run, *, is_main: bool, trackers: Sequence[Follower] = (), warned: Warned | None = None
    ) -> None:
        self._run = run
        self._is_main = is_main
        self._trackers = trackers
        self._warned = warned
        self._step = 0

    def train(self, record: Record) -> None:
        """See :class:`Reporter`."""
        self._write(record)

    def validation(self, record: Record) -> None:
        """See :class:`Reporter`."""
        self._write(record)

    def event(self, record: Record) -> None:
        """See :class:`Reporter`."""
        self._write(record)

    def row_losses(self, first: int, losses: npt.NDArray[np.float64]) -> None:
        """See :class:`Reporter`."""
        if self._is_main:
            self._run.row_losses.touch()
            with self._run.row_losses.open("r+b") as file:
                file.seek(4 * first)
                file.write(losses.astype("<f4").tobytes())

    def _write(self, record: Record) -> None:
        if not self._is_main:
            return
        append_line(self._run.metrics, record)
        self._step = record["step"]
        for tracker in self._trackers:
            if record["kind"] != "event":
                tracker.tell(record)
        self._add_asides()

    def _add_asides(self) -> None:
        """Tells what trackers went wrong, and what libraries warn of, each once."""
        for tracker in self._trackers:
            if problem := tracker.problem():
                append_line(self._run.metrics, event("tracker", self._step, problem))
        for warning in self._warned.new() if self._warned else ():
            append_line(self._run.metrics, event("warning", self._step, warning))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            close_all(self._trackers, ended_well=kind is None)
            self._add_asides()

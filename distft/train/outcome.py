"""What crosses between those who start workers and the workers: how they were started, and how training ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from distft.runs import Stop


@dataclass(frozen=True)
class Attempt:
    """One start of a group of workers.

    Attributes:
        most_workers: How many workers there may be at other times; the micro-batch is chosen so that it need not
            change with their number. None: as many as now.
        micro_batch_limit: The most rows of a forward pass, where more ran out of memory.
        began: When it was started, in seconds since the epoch.
        stall_seconds: After how long without a step training stands still; None for automatic.
        rungs: Training tokens at which a trial of a search is compared with others: it validates at the first step
            that reaches each, and at its end, in place of ``train.validate_every``. None: it is no trial.
        until: The rung at which it saves and stops, for others to have their turn. None: it goes on to its end.
    """

    most_workers: int | None = None
    micro_batch_limit: int | None = None
    began: float | None = None
    stall_seconds: float | None = None
    rungs: tuple[int, ...] | None = None
    until: int | None = None


FIRST = Attempt()


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        step: Updates made.
        best_step: The validated step with the lowest loss, or None.
        stopped: Why it stopped before its end, where somebody asked it to.
        metrics: The last training loss, and the best validation loss where there is one.
    """

    step: int
    best_step: int | None
    stopped: Stop | None
    metrics: dict[str, float] = field(default_factory=dict)

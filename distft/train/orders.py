"""What somebody asks training to do, decided on rank 0 and carried to all ranks in the step's exchange."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from distft.errors import RunError
from distft.runs import Run, Stop, StopRequest, read_json

_STOPS: tuple[Stop, ...] = get_args(Stop)


@dataclass(frozen=True)
class Orders:
    """What to do after this step.

    Attributes:
        stop: Save and stop, and why; ``resize`` waits for the next checkpoint.
        save: Save, and go on.
    """

    stop: Stop | None = None
    save: bool = False

    def encoded(self) -> list[float]:
        """As numbers that can be summed over ranks when all ranks but one have no orders."""
        return [0.0 if self.stop is None else 1.0 + _STOPS.index(self.stop), float(self.save)]

    @classmethod
    def decoded(cls, numbers: Sequence[float]) -> Orders:
        """From :meth:`encoded`."""
        stop, save = numbers
        return cls(None if stop == 0 else _STOPS[int(stop) - 1], save > 0)


NO_ORDERS = Orders()


def asked(run: Run, began: float | None) -> StopRequest | None:
    """What a run asks of its workers.

    Args:
        run: The run.
        began: When the asking worker's group was started; None where nobody would start another.

    Raises:
        RunError: The worker is not of this run any more: its host was cut off, the cluster took it for lost, and it
            has gone on alone. Another group of workers writes the run's files now.
    """
    if began is not None and read_json(run.group) != began:
        raise RunError("other workers have taken this run over", where=run.name, fix="none is needed: it goes on there")
    return run.asked()


class Listening:
    """Turns the run's stop request into orders.

    Before a node goes there are two checkpoints: one at once, lest the notice was too long, and one just before the
    deadline, so that the work in between is kept.

    Args:
        asked: The request, or None.
        save_seconds: How long the last save took.
    """

    def __init__(self, asked: Callable[[], StopRequest | None], save_seconds: Callable[[], float]) -> None:
        self._asked = asked
        self._save_seconds = save_seconds
        self._saved_for: float | None = None
        self._before = time.time()

    def __call__(self) -> Orders:
        """What to do after this step; called once in each."""
        now = time.time()
        step_seconds, self._before = now - self._before, now
        request = self._asked()
        if request is None:
            return NO_ORDERS
        if request.reason != "preempted" or request.deadline is None:
            return Orders(stop=request.reason)
        if now + step_seconds + 2 * self._save_seconds() >= request.deadline:  # one more step would be too many
            return Orders(stop="preempted")
        first, self._saved_for = self._saved_for != request.deadline, request.deadline
        return Orders(save=first)

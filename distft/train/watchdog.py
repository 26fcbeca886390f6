"""Noticing that training stands still: each rank writes down where it is, without anybody's help.

The dump comes from a thread of C that needs no interpreter lock (https://docs.python.org/3/library/faulthandler.html),
so that it also comes while a rank waits in a collective. A process that is stopped or gone writes none: that tells too.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

#: A stall is that many times the median step, and no shorter than this: the first steps and validation take longer.
MEDIAN_STEPS, SHORTEST_SECONDS = 10, 60.0


def stall_seconds(set_seconds: float | None, step_seconds: Sequence[float]) -> float:
    """After how long without a step training is taken to stand still.

    Args:
        set_seconds: What the job says; None for automatic.
        step_seconds: How long the last steps took.
    """
    if set_seconds is not None:
        return set_seconds
    return max(SHORTEST_SECONDS, MEDIAN_STEPS * statistics.median(step_seconds) if step_seconds else 0.0)


class Watchdog:
    """Dumps every thread's stack to a file when there is no sign of life for too long; a context.

    Args:
        path: Where to; it is emptied first, and touched at each sign of life.
        set_seconds: After how long; None for automatic.
    """

    def __init__(self, path: Path, set_seconds: float | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("w", encoding="utf-8")
        self._set_seconds = set_seconds
        self._seconds: deque[float] = deque(maxlen=20)

    def alive(self) -> None:
        """A step begins, or a pass of a validation."""
        os.utime(self._path)
        faulthandler.dump_traceback_later(stall_seconds(self._set_seconds, self._seconds), file=self._file)

    def step_took(self, seconds: float) -> None:
        """How long a step took."""
        self._seconds.append(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

"""What a task makes of a document: the contact between the task room and this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

KEPT = "kept"  # used whole, in one segment
TRUNCATED = "truncated"  # its end was cut off
SPLIT = "split"  # used whole, in several segments
DROPPED = "dropped"  # too long, left out
EMPTY = "empty"  # no text
NO_TARGET = "no_target"  # nothing in it to predict
OVERLONG = "overlong"  # too long, and the job says that this is an error
FATES = (KEPT, TRUNCATED, SPLIT, DROPPED, EMPTY, NO_TARGET, OVERLONG)


@dataclass(frozen=True)
class Example:
    """One document as token ids, and what of it is trained on.

    Attributes:
        ids: int32 (T,), the whole document.
        spans: (start, length) of each segment cut from ``ids``; the first token of a segment is context only.
        fate: One of ``FATES``.
        scored_bytes: UTF-8 bytes of the text that the supervised tokens of all spans stand for.
        supervised: bool (T,), which tokens are targets; None: every one that is not first in its segment.
    """

    ids: NDArray[np.int32]
    spans: tuple[tuple[int, int], ...]
    fate: str
    scored_bytes: int
    supervised: NDArray[np.bool_] | None = None


class Task(Protocol):
    """What preparing asks of a task; it travels to other processes, so it must pickle."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns that ``encode`` reads, in order."""

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        """One example for each row, in order; a row holds the text of each of ``columns``, none of them empty."""

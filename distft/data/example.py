"""What a task makes of a document: the contact between the task room and this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

KEPT = "kept"  # used whole, in one segment
TRUNCATED = "truncated"  # its end was cut off
SPLIT = "split"  # used whole, in several segments
DROPPED = "dropped"  # too long, left out
EMPTY = "empty"  # no text
NO_TARGET = "no_target"  # nothing in it to predict
OVERLONG = "overlong"  # too long, and the job says that this is an error
LEFT_OUT = "left_out"  # of a source whose weight leaves it out of the training split
FATES = (KEPT, TRUNCATED, SPLIT, DROPPED, EMPTY, NO_TARGET, OVERLONG, LEFT_OUT)


@dataclass(frozen=True)
class Column:
    """A column that a task reads. Whatever it holds reaches the task as text.

    Attributes:
        name: Its name in the source.
        kind: "text" (a string); "label" (a string, an integer or a boolean, as text); "messages" (a conversation in
            the shape of OpenAI or ShareGPT, as the JSON text of a list of {"role", "content"}).
        optional: Whether it may be null, blank or absent; a row where any other column is has the fate "empty".
    """

    name: str
    kind: Literal["text", "label", "messages"] = "text"
    optional: bool = False


@dataclass(frozen=True)
class Example:
    """One document as token ids, and what of it is trained on.

    Attributes:
        ids: int32 (T,), the whole document. Where there is a label, one more id stands at the end for its number,
            which is not known before the splits are: a classifier predicts it as a language model does a next token.
        spans: (start, length) of each segment cut from ``ids``; the first token of a segment is context only.
        fate: One of ``FATES``.
        scored_bytes: UTF-8 bytes of the text that the supervised tokens of all spans stand for.
        supervised: bool (T,), which tokens are targets; None: every one that is not first in its segment.
        label: The label's name, where the task has labels; the last of ``ids`` is then any number.
        cut: (field, tokens) that were cut off to make it fit, where ``ids`` is no longer the whole document.
        unlearnt: Answers of a conversation that are no targets, since the chat template writes them otherwise later.
    """

    ids: NDArray[np.int32]
    spans: tuple[tuple[int, int], ...]
    fate: str
    scored_bytes: int
    supervised: NDArray[np.bool_] | None = None
    label: str | None = None
    cut: tuple[tuple[str, int], ...] = ()
    unlearnt: int = 0


class Task(Protocol):
    """What preparing asks of a task; it travels to other processes, so it must pickle."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that ``encode`` reads, in order."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the data card should know of the task: plain values, such as the text a template adds."""

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        """One example for each row, in order.

        A row holds the text of each of ``columns``, "" for an optional one that is null or absent; no other is blank.
        """

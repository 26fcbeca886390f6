"""A micro-batch as tensors. Shapes: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position that carries no loss (torch's own ``ignore_index``)."""


class Row(Protocol):
    """What a row of prepared data gives: T token ids in one or more segments, one after the other."""

    @property
    def input_ids(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Token ids, (T,)."""

    @property
    def supervised(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether a token is a target, (T,)."""

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths in tokens; they sum to T."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: Token ids, (B, T) int64, padded on the right.
        position_ids: Positions, (B, T) int64, from 0 in each segment; the padding is a segment of its own.
            These alone keep segments apart: transformers reads the boundaries from them as long as it gets
            neither an attention mask nor a cache.
        labels: What each position must predict, (B, T) int64: ``labels[b, t]`` is the id of token t + 1 where
            that token is supervised and of the same segment, else -100. Already shifted.
        is_empty: Whether it stands for no rows at all, as :meth:`empty` makes it.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    is_empty: bool = False

    @property
    def supervised_tokens(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORED).sum())

    def around_first_target(self, tokens: int) -> Batch:
        """At most so many columns of it, around the first that carries loss: a little of it that is cheap to pass."""
        columns = (self.labels != IGNORED).any(dim=0).nonzero()
        first = int(columns[0]) if len(columns) else 0
        start = max(0, first - tokens // 2)
        part = slice(start, start + tokens)
        return Batch(self.input_ids[:, part], self.position_ids[:, part], self.labels[:, part], self.is_empty)

    def columns(self, index: int, parts: int) -> Batch:
        """One of equal parts of the columns, (B, T / parts): T rounded up by padding without loss."""
        width = -(-self.labels.shape[1] // parts)
        more = width * parts - self.labels.shape[1]
        part = slice(index * width, (index + 1) * width)
        ids = F.pad(self.input_ids, (0, more), value=int(self.input_ids[0, 0]))
        positions = torch.cat([self.position_ids, torch.arange(more).expand(len(ids), -1)], dim=1)
        labels = F.pad(self.labels, (0, more), value=IGNORED)
        ids, positions, labels = (each[:, part].contiguous() for each in (ids, positions, labels))
        return Batch(ids, positions, labels, self.is_empty)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; a GPU copies it when it comes to that, and nothing waits for it."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

        return Batch(moved(self.input_ids), moved(self.position_ids), moved(self.labels), self.is_empty)

    @classmethod
    def collate(cls, rows: Sequence[Row], pad_id: int, width: int | None = None) -> Batch:
        """Rows of any lengths as one batch.

        Args:
            rows: At least one row.
            pad_id: The token that fills shorter rows; it is never a target, whichever it is.
            width: Its T, no less than the longest row; None: that.
        """
        width = width or max(len(row.input_ids) for row in rows)
        input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
        position_ids = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for index, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[index, :length] = row.input_ids
            target = row.supervised.astype(bool)  # a copy: the first token of a segment is nobody's to predict
            target[np.cumsum((0, *row.segments[:-1]))] = False
            labels[index, : length - 1][target[1:]] = row.input_ids[1:][target[1:]]
            position_ids[index] = np.concatenate([np.arange(n) for n in (*row.segments, width - length)])
        return cls(torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(labels))

    @classmethod
    def empty(cls, pad_id: int) -> Batch:
        """One row of two tokens without any loss: what a rank runs when the others have one micro-batch more."""
        return cls(torch.full((1, 2), pad_id), torch.arange(2)[None], torch.full((1, 2), IGNORED), is_empty=True)

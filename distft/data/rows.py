"""The rows of a split: its documents in the order of their content, their segments packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distft.data import digests, ragged
from distft.data.index import Spans
from distft.data.packing import pack

_CHUNK = 1 << 16
_SEGMENT = np.dtype([("content", "V16"), ("start", "<i8"), ("length", "<i8")])


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split.

    Attributes:
        ids: uint64 (rows,), a hash of what each row holds.
        begins: int64 (rows + 1,), where the segments of each row begin, and where the last end.
        document: int32 (S,), the document of each segment, row by row.
        start: int32 (S,), its first token.
        length: int32 (S,), its tokens.
        tokens: int32 (rows,), tokens of each row.
        supervised: int32 (rows,), targets of each row.
    """

    ids: NDArray[np.uint64]
    begins: NDArray[np.int64]
    document: NDArray[np.int32]
    start: NDArray[np.int32]
    length: NDArray[np.int32]
    tokens: NDArray[np.int32]
    supervised: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def columns(self) -> dict[str, pa.Array]:
        """As they are stored."""
        begins = pa.array(self.begins, pa.int32())
        segments = {"document": self.document, "start": self.start, "length": self.length}
        return {
            "id": pa.array(self.ids),
            "tokens": pa.array(self.tokens),
            "supervised": pa.array(self.supervised),
            **{name: pa.ListArray.from_arrays(begins, pa.array(values)) for name, values in segments.items()},
        }


def rows_of(
    documents: NDArray[np.int64],
    copies: NDArray[np.int32],
    content: NDArray[np.uint64],
    spans: Spans,
    max_tokens: int,
    packing: bool,
) -> SplitRows:
    """The rows of a split, a function of what its documents hold.

    Args:
        documents: Numbers of the split's documents.
        copies: Times that each of all documents is used; a second time comes after all first ones.
        content: Digest of what each of all documents holds, uint64 (N, 2).
        spans: The segments of all documents.
        max_tokens: Tokens of a row.
        packing: Whether a row holds several segments.
    """
    once = documents[digests.order(content[documents])]
    rounds = [once[copies[once] > number] for number in range(int(copies[once].max(initial=0)))]
    ordered = np.concatenate(rounds) if rounds else once[:0]
    firsts = (ragged.begins(spans.counts)[:-1])[ordered]
    counts = spans.counts[ordered]
    document = np.repeat(ordered.astype(np.int32), counts)
    segment = ragged.ranges(firsts, counts)
    if packing:
        places, begins = pack(spans.length[segment], max_tokens)
        document, segment = document[places], segment[places]
    else:
        begins = np.arange(len(segment) + 1, dtype=np.int64)
    start, length = spans.start[segment], spans.length[segment]
    ids = np.fromiter(_ids(content, document, start, length, begins), np.uint64, len(begins) - 1)
    tokens, supervised = (
        np.add.reduceat(values, begins[:-1], dtype=np.int32) for values in (length, spans.targets[segment])
    )
    return SplitRows(ids, begins, document, start, length, tokens, supervised)


def _ids(
    content: NDArray[np.uint64],
    document: NDArray[np.int32],
    start: NDArray[np.int32],
    length: NDArray[np.int32],
    begins: NDArray[np.int64],
) -> Iterator[int]:
    """A hash of what each row holds: 8 bytes, of the content of its documents and of what is used of them."""
    for first in range(0, len(begins) - 1, _CHUNK):
        bounds = begins[first : first + _CHUNK + 1]
        chosen = slice(bounds[0], bounds[-1])
        segments = np.empty(len(document[chosen]), dtype=_SEGMENT)
        segments["content"] = np.frombuffer(digests.content(content[document[chosen]]), "V16")
        segments["start"], segments["length"] = start[chosen], length[chosen]
        raw = segments.tobytes()
        ends = ((bounds - bounds[0]) * _SEGMENT.itemsize).tolist()
        for begin, end in pairwise(ends):
            yield int.from_bytes(hashlib.blake2b(raw[begin:end], digest_size=8).digest(), "little")

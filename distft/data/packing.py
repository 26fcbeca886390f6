"""Several segments in one row: best-fit decreasing, a function of the segments' lengths alone.

Best-fit decreasing needs at most 11/9 of the optimal number of rows, plus 4 (D. S. Johnson, "Near-optimal bin packing
algorithms", 1973); on real documents it fills rows to within a few tokens. See also Ding et al., "Fewer Truncations
Improve Language Modeling", arXiv 2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from distft.data import ragged


def pack(lengths: NDArray[np.int32], max_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Segment numbers of all rows end to end, int64 (S,), and where each row begins and the last ends, (rows + 1,).

    Longest first, each into the fullest row that still holds it; each segment lies whole in one row. Segments of one
    length are placed together: a row with room for m of them takes m before the next one does, as it is the fullest
    that holds them. So the work is one sort, in linear time
    for rows of up to 65,535 tokens, and array steps of which there are few for each length.

    Args:
        lengths: Tokens of each segment, 1 .. ``max_tokens``.
        max_tokens: Tokens that a row holds.
    """
    # Numpy sorts numbers of 16 bits by radix, in linear time; others it compares.
    least = np.uint16 if max_tokens <= np.iinfo(np.uint16).max else np.int32
    order = np.argsort((max_tokens - lengths).astype(least), kind="stable")
    counts = np.bincount(lengths)
    row_of, place = (np.empty(len(lengths), dtype=np.int32) for _ in range(2))  # and which of its row's segments it is
    held = np.zeros(len(lengths), dtype=np.int32)  # segments of each row
    space = _Space()
    rows = start = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = start + int(counts[length])
        while start < end:
            free, opened = space.take(length) or (max_tokens, None)
            each = free // length
            needed = -(-(end - start) // each)
            if opened is None:
                opened = np.arange(rows, rows + needed, dtype=np.int32)
                rows += needed
            filled = opened[:needed]
            count = min(len(filled) * each, end - start)
            row_of[start : start + count] = np.repeat(filled, each)[:count]
            places = held[filled, None] + np.arange(each, dtype=np.int32)
            place[start : start + count] = places.ravel()[:count]
            in_last = count - (len(filled) - 1) * each
            held[filled] += each
            held[filled[-1]] += in_last - each
            space.put(free, opened[needed:])
            space.put(free - each * length, filled[:-1])
            space.put(free - in_last * length, filled[-1:])
            start += count
    begins = ragged.begins(held[:rows])
    where = begins[row_of]
    where += place
    found = np.empty_like(order)
    found[where] = order
    return found, begins


class _Space:
    """Rows by their free tokens, of which there are at most ``max_tokens`` different numbers."""

    def __init__(self) -> None:
        self._rows: dict[int, list[NDArray[np.int32]]] = {}
        self._free: list[int] = []  # the keys, sorted

    def take(self, length: int) -> tuple[int, NDArray[np.int32]] | None:
        """The fullest rows that hold ``length`` tokens more, and how many they are free for; these are taken out."""
        place = bisect_left(self._free, length)
        if place == len(self._free):
            return None
        free = self._free.pop(place)
        return free, np.concatenate(self._rows.pop(free))

    def put(self, free: int, rows: NDArray[np.int32]) -> None:
        """Puts rows in."""
        if not len(rows) or not free:
            return
        if free not in self._rows:
            self._rows[free] = []
            insort(self._free, free)
        self._rows[free].append(rows)

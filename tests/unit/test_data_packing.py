"""Packing: nothing lost, nothing too long, nearly nothing empty."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data import packing


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    segments, begins = packing.pack(lengths.astype(np.int32), room)
    return [part.tolist() for part in np.split(segments, begins[1:-1])] if len(segments) else []


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 64).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=80))))
def test_every_segment_once_and_no_row_overfull(drawn: tuple[int, list[int]]) -> None:
    room, lengths = drawn
    rows = pack(np.array(lengths, dtype=np.int64), room)
    assert sorted(segment for row in rows for segment in row) == list(range(len(lengths)))
    sizes = [sum(lengths[segment] for segment in row) for row in rows]
    assert all(0 < size <= room for size in sizes)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // room) + sum(2 * length > room for length in lengths) + 4


def reference(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook has it, O(n²): the fullest row that still holds the segment."""
    rows: list[list[int]] = []
    free: list[int] = []
    for segment in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        fitting = [row for row in range(len(rows)) if free[row] >= lengths[segment]]
        best = min(fitting, key=free.__getitem__, default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            free.append(room)
        rows[best].append(segment)
        free[best] -= lengths[segment]
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60))
def test_as_full_as_the_textbook(lengths: list[int]) -> None:
    def fill(rows: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[segment] for segment in row) for row in rows)

    assert fill(pack(np.array(lengths, dtype=np.int64), 32)) == fill(reference(lengths, 32))


def test_real_lengths_fill_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 5000).astype(np.int64), 1, 1024)
    rows = pack(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.995

"""The order of rows: a function of rows, seed and step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data import order
from distft.data.order import Order, sample_digest

SEEDS = st.integers(0, 2**32 - 1)


def flat(one: Order) -> list[int]:
    return [int(index) for step in range(one.steps) for index in one.step(step)]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 700), seed=SEEDS, batch=st.integers(1, 97), epochs=st.integers(1, 3))
def test_invariant_1_order_every_epoch_uses_every_row_once(rows: int, seed: int, batch: int, epochs: int) -> None:
    used = flat(Order(rows, seed, batch, rows * epochs))
    for epoch in range(epochs):
        assert sorted(used[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300), seed=SEEDS, batch=st.integers(1, 50), other=st.integers(1, 50), total=st.integers(1, 900)
)
def test_invariant_1_order_batch_size_only_cuts_the_same_stream(
    rows: int, seed: int, batch: int, other: int, total: int
) -> None:
    """Steps may cross the end of an epoch, be longer than one, and the last may be short."""
    one = Order(rows, seed, batch, total)
    assert flat(one) == flat(Order(rows, seed, other, total))
    assert [len(one.step(step)) for step in range(one.steps - 1)] == [batch] * (one.steps - 1)
    assert len(one.step(one.steps - 1)) == total - batch * (one.steps - 1)


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_invariant_1_order_many_steps_at_once_are_the_steps_one_by_one(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_BLOCK", block)
    one = Order(9, 17, 4, 30)
    for count in (0, 1, 3, one.steps, one.steps + 2):
        steps = [one.step(step).tolist() for step in range(min(count, one.steps))]
        assert [rows.tolist() for rows in one.first(count)] == steps


def test_invariant_1_order_is_fixed_for_ever() -> None:
    """These digits are what earlier runs trained on: a change of them breaks every resume."""
    assert Order(10, 17, 4, 20).step(1).tolist() == [9, 3, 0, 4]
    assert Order(1_000_003, 17, 3, 3_000_000).step(123_456).tolist() == [5637, 704552, 737994]
    assert sample_digest([1, 2**64 - 1]) == "5b0b070169a0096382a72f8dac328867"


def test_invariant_1_order_seek_costs_the_same_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    work = []
    plain = order._feistel

    def counted(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
        work.append(len(values))
        return plain(values, half_bits, keys)

    monkeypatch.setattr(order, "_feistel", counted)
    long = Order(10**9 + 7, 3, 64, 10**15)
    for step in (0, 1, 10**6, 10**12, long.steps - 1):
        work.clear()
        long.step(step)
        assert sum(work) <= 8 * 64


def test_epochs_and_seeds_differ_and_neighbours_are_torn_apart() -> None:
    rows = 4096
    one, two = (np.array(flat(Order(rows, 17, rows, rows * 2)))[part] for part in (slice(0, rows), slice(rows, None)))
    other = np.array(flat(Order(rows, 18, rows, rows)))
    for left, right in ((one, two), (one, other), (one, np.arange(rows))):
        assert (left == right).mean() < 0.01
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.06
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.06


def test_first_positions_are_uniform_over_seeds() -> None:
    counts = np.bincount([Order(6, seed, 1, 6).step(0)[0] for seed in range(3000)], minlength=6)
    assert ((counts - 500) ** 2 / 500).sum() < 25  # chi-squared, 5 degrees of freedom: p = 0.0001


def test_sample_digest_tells_order_and_content() -> None:
    assert len({sample_digest(ids) for ids in ([1, 2], [2, 1], [1], [1, 2, 0], [])}) == 5


def test_there_is_no_step_past_the_end() -> None:
    with pytest.raises(IndexError):
        Order(5, 1, 2, 5).step(3)
    with pytest.raises(ValueError, match="no order"):
        Order(0, 1, 2, 5)

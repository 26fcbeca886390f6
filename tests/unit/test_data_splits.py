"""Splits: fixed by content and seed, whole units, exact shares."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data import digests, splits
from distft.data.splits import SPLITS, refuse_empty
from distft.errors import DataError

UNITS = st.lists(st.integers(0, 40).map(lambda number: f"unit {number}".encode()), min_size=1, max_size=120)
SHARES = st.fixed_dictionaries({"validation": st.floats(0, 0.45), "test": st.floats(0, 0.45)})


def assign(units: list[bytes], shares: dict[str, float], seed: int, strata: list[str] | None = None) -> np.ndarray:
    names = sorted({*(strata or ())})
    codes = None if strata is None else np.array([names.index(name) for name in strata], dtype=np.int32)
    return splits.assign(digests.array(b"".join(map(digests.digest, units))), shares, seed, codes)


def sizes(found: np.ndarray) -> list[int]:
    return [int((found == split).sum()) for split in range(len(SPLITS))]


@settings(max_examples=100, deadline=None)
@given(units=UNITS, shares=SHARES, seed=st.integers(0, 99), shuffle=st.randoms(use_true_random=False))
def test_row_order_does_not_matter_and_units_stay_whole(units, shares, seed, shuffle) -> None:  # type: ignore[no-untyped-def]
    first = dict(zip(units, assign(units, shares, seed).tolist(), strict=True))
    permuted = list(units)
    shuffle.shuffle(permuted)
    assert assign(permuted, shares, seed).tolist() == [first[unit] for unit in permuted]


@settings(max_examples=100, deadline=None)
@given(units=UNITS, shares=SHARES, seed=st.integers(0, 99))
def test_sizes_are_within_one_unit_of_what_was_asked(units, shares, seed) -> None:  # type: ignore[no-untyped-def]
    found = sizes(assign(units, shares, seed))
    largest = max(Counter(units).values())
    for split in ("test", "validation"):
        wanted = math.floor(shares[split] * len(units) + 0.5)
        taken = found[SPLITS.index(split)]
        left = len(units) - (found[SPLITS.index("test")] if split == "validation" else 0)
        assert min(wanted, left) <= taken < wanted + largest


@pytest.mark.parametrize("count", [20, 97, 1000])
def test_plain_shares_are_exact(count: int) -> None:
    units = [str(number).encode() for number in range(count)]
    found = sizes(assign(units, {"validation": 0.1, "test": 0.2}, 5))
    wanted = [math.floor(share * count + 0.5) for share in (0.1, 0.2)]
    assert found == [count - sum(wanted), *wanted]


def test_the_test_split_stays_when_the_validation_share_changes() -> None:
    units = [str(number).encode() for number in range(200)]
    one, two = (assign(units, {"validation": share, "test": 0.1}, 5) for share in (0.1, 0.3))
    assert (one == 2).tolist() == (two == 2).tolist()


def test_another_seed_draws_others() -> None:
    units = [str(number).encode() for number in range(200)]
    assert assign(units, {"test": 0.5}, 1).tolist() != assign(units, {"test": 0.5}, 2).tolist()


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), seed=st.integers(0, 20))
def test_each_stratum_has_its_share(counts: list[int], seed: int) -> None:
    strata = [f"stratum {stratum}" for stratum, count in enumerate(counts) for _ in range(count)]
    units = [f"{number}".encode() for number in range(len(strata))]
    found = assign(units, {"validation": 0.2, "test": 0.2}, seed, strata)
    for stratum, count in enumerate(counts):
        chosen = found[[name == f"stratum {stratum}" for name in strata]]
        assert abs((chosen == 2).sum() - 0.2 * count) <= 1
        assert abs((chosen == 1).sum() - 0.2 * count) <= 1
    assert (found == 2).sum() == math.floor(0.2 * len(units) + 0.5)


def test_a_unit_of_several_strata_stays_whole() -> None:
    units = [b"a", b"a", b"a", b"b", b"c", b"d"]
    found = assign(units, {"test": 0.5}, 3, ["x", "x", "y", "x", "y", "y"])
    assert len({int(split) for split in found[:3]}) == 1


def test_an_empty_split_is_refused_with_what_to_set() -> None:
    documents = {"train": 8, "validation": 0, "test": 0}
    with pytest.raises(DataError, match=r"validation split is empty: of 8 documents train 8") as refused:
        refuse_empty(documents, documents, {"validation": 0.05, "test": 0})
    assert "data.splits.validation to at least 0.0625" in str(refused.value)
    assert "at least 10 documents" in str(refused.value)
    refuse_empty(documents, documents, {"validation": 0, "test": 0.0})
    assert sizes(assign([bytes([one]) for one in range(8)], {"validation": 0.0625}, 0)) == [7, 1, 0]
    assert sizes(assign([bytes([one]) for one in range(10)], {"validation": 0.05}, 0)) == [9, 1, 0]


def test_a_split_that_lost_all_its_rows_says_why() -> None:
    with pytest.raises(DataError, match="all 3 documents of the test split were dropped"):
        refuse_empty({"train": 5, "test": 0}, {"train": 5, "test": 3}, {"test": 0.3})
    with pytest.raises(DataError, match="the train split is empty"):
        refuse_empty({"test": 3}, {"test": 3}, {"test": 0.9})

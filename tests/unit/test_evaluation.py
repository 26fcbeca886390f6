"""Scores: sums over documents, intervals by resampling documents, differences paired."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.data.order import sampled_rows
from distft.errors import DataError
from distft.evaluation import METRICS, DocumentScore, difference, merge, summarise


def scores(losses: list[float], tokens: int = 100, length: int = 400) -> list[DocumentScore]:
    return [DocumentScore(number, loss * tokens, tokens, length) for number, loss in enumerate(losses)]


def test_values_are_ratios_of_sums_over_documents() -> None:
    parts = [DocumentScore(0, 200.0, 100, 400), DocumentScore(1, 30.0, 10, 50)]
    found = summarise(parts, METRICS, seed=1)
    assert found["loss"].value == pytest.approx(230 / 110)
    assert found["perplexity"].value == pytest.approx(math.exp(230 / 110))
    assert found["bits_per_byte"].value == pytest.approx(230 / math.log(2) / 450)
    assert found["loss"].n == 2


def test_parts_of_a_document_add_up() -> None:
    parts = [DocumentScore(3, 1.0, 2, 5), DocumentScore(1, 4.0, 1, 1), DocumentScore(3, 2.5, 4, 7)]
    assert merge(parts) == [DocumentScore(3, 3.5, 6, 12), DocumentScore(1, 4.0, 1, 1)]


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        drawn = summarise(scores(list(random.normal(3.0, 0.5, size=40))), ["loss"], seed=trial)["loss"]
        assert drawn.low < drawn.value < drawn.high
        covered += drawn.low <= 3.0 <= drawn.high
    assert 178 <= covered <= 199  # 95 % of 200; the percentile method falls a little short on 40 documents


def test_the_difference_is_paired() -> None:
    """Documents differ far more than the models do; pairing sees the small change all the same."""
    random = np.random.default_rng(7)
    hardness = random.normal(3.0, 1.0, size=30)
    base = scores(list(hardness))
    tuned = scores(list(hardness - 0.05 + random.normal(0, 0.01, size=30)))
    change = difference(base, tuned, ["loss"], seed=3)["loss"]
    assert change.value == pytest.approx(-0.05, abs=0.01)
    assert change.high < 0
    assert summarise(base, ["loss"], 3)["loss"].low < summarise(tuned, ["loss"], 3)["loss"].high  # unpaired: unseen


def test_the_difference_does_not_depend_on_the_order_of_documents() -> None:
    base, tuned = scores([3.0, 2.0, 4.0]), scores([2.5, 2.1, 3.0])
    assert difference(base, tuned, METRICS, 1) == difference(base[::-1], tuned, METRICS, 1)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="no supervised token"):
        summarise([], METRICS, seed=1)


@given(rows=st.integers(0, 500), samples=st.integers(1, 600), seed=st.integers(0, 2**31))
def test_sampled_rows_are_distinct_and_fixed_by_the_seed(rows: int, samples: int, seed: int) -> None:
    drawn = sampled_rows(rows, samples, seed)
    assert len(drawn) == min(rows, samples) == len(set(drawn.tolist()))
    assert all(0 <= row < rows for row in drawn)
    assert (drawn == sampled_rows(rows, samples, seed)).all()

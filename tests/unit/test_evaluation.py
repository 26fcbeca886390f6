"""Scores: sums over documents, intervals by resampling documents, differences paired."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.data.order import sampled_rows
from distft.errors import DataError
from distft.evaluation import DocumentScore, classes, difference, merge, summarise
from distft.task.metrics import mean_statistics, token_statistics
from distft.task.metrics_classes import bin_statistics, class_statistics

METRICS = ("loss", "perplexity", "bits_per_byte")


def read(document: int, loss: float, tokens: int, length: int) -> DocumentScore:
    return DocumentScore(document, {"tokens": token_statistics(loss, tokens, length)})


def scores(losses: list[float], tokens: int = 100, length: int = 400) -> list[DocumentScore]:
    return [read(number, loss * tokens, tokens, length) for number, loss in enumerate(losses)]


def classified(outcomes: list[bool], confidence: float = 0.8) -> list[DocumentScore]:
    """Examples of two labels in turns, right or wrong."""
    return [
        DocumentScore(
            number,
            {
                "tokens": token_statistics(-math.log(confidence if right else 1 - confidence), 1, 0),
                "classes": class_statistics(number % 2, number % 2 if right else 1 - number % 2, 2),
                "bins": bin_statistics(right, confidence),
            },
        )
        for number, right in enumerate(outcomes)
    ]


def test_values_are_ratios_of_sums_over_documents() -> None:
    found = summarise([read(0, 200.0, 100, 400), read(1, 30.0, 10, 50)], METRICS, seed=1)
    assert found["loss"].value == pytest.approx(230 / 110)
    assert found["perplexity"].value == pytest.approx(math.exp(230 / 110))
    assert found["bits_per_byte"].value == pytest.approx(230 / math.log(2) / 450)
    assert found["loss"].n == 2
    assert list(found) == list(METRICS)


def test_parts_of_a_document_add_up() -> None:
    answer = DocumentScore(3, {"length": mean_statistics(9)})
    merged = merge([read(3, 1.0, 2, 5), read(1, 4.0, 1, 1), answer, read(3, 2.5, 4, 7)])
    found = {score.document: {name: value.tolist() for name, value in score.statistics.items()} for score in merged}
    assert found == {3: {"tokens": [3.5, 6, 12], "length": [9, 1]}, 1: {"tokens": [4, 1, 1]}}


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        drawn = summarise(scores(list(random.normal(3.0, 0.5, size=40))), ["loss"], seed=trial)["loss"]
        assert drawn.low < drawn.value < drawn.high
        covered += drawn.low <= 3.0 <= drawn.high
    assert 178 <= covered <= 199  # 95 % of 200; the percentile method falls a little short on 40 documents


def test_an_interval_of_accuracy_is_the_binomial_one() -> None:
    drawn = summarise(classified([True] * 320 + [False] * 80), ["accuracy", "macro_f1", "calibration_error"], seed=2)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert drawn["accuracy"].value == 0.8
    assert drawn["accuracy"].low == pytest.approx(0.8 - half, abs=0.006)
    assert drawn["accuracy"].high == pytest.approx(0.8 + half, abs=0.006)
    assert drawn["calibration_error"].value == pytest.approx(0, abs=1e-9)  # 0.8 sure, and right 0.8 of the time


def test_the_difference_is_paired() -> None:
    """Documents differ far more than the models do; pairing sees the small change all the same."""
    random = np.random.default_rng(7)
    hardness = random.normal(3.0, 1.0, size=30)
    base = scores(list(hardness))
    tuned = scores(list(hardness - 0.05 + random.normal(0, 0.01, size=30)))
    change = difference(base, tuned, ["loss"], seed=3)["loss"]
    assert change.value == pytest.approx(-0.05, abs=0.01)
    assert change.high < 0
    assert change.p == pytest.approx(2 / 2001)  # no resample on the other side of zero
    assert summarise(base, ["loss"], 3)["loss"].low < summarise(tuned, ["loss"], 3)["loss"].high  # unpaired: unseen


def test_a_p_value_is_as_small_as_often_as_it_says() -> None:
    """Two models that are right equally often: p below 0.1 in about a tenth of the trials."""
    random = np.random.default_rng(11)
    found = [
        difference(
            classified((random.random(150) < 0.7).tolist()),
            classified((random.random(150) < 0.7).tolist()),
            ["accuracy"],
            seed=trial,
        )["accuracy"].p
        for trial in range(100)
    ]
    assert 4 <= sum(p < 0.1 for p in found if p is not None) <= 17


def test_a_model_does_not_differ_from_itself() -> None:
    change = difference(classified([True, False, True]), classified([True, False, True]), ["accuracy"], 1)["accuracy"]
    assert (change.value, change.low, change.high, change.p) == (0, 0, 0, 1)


def test_the_difference_does_not_depend_on_the_order_of_documents() -> None:
    base, tuned = scores([3.0, 2.0, 4.0]), scores([2.5, 2.1, 3.0])
    assert difference(base, tuned, METRICS, 1) == difference(base[::-1], tuned, METRICS, 1)


def test_answers_may_be_fewer_than_documents() -> None:
    """Every document was read, three were answered: each value is over what it is about."""
    answers = [DocumentScore(number, {"length": mean_statistics(10 * number)}) for number in range(3)]
    found = summarise(merge([*scores([2.0] * 10), *answers]), ["length", "loss"], seed=1)
    assert (found["loss"].n, found["length"].n) == (10, 3)
    assert (found["loss"].value, found["length"].value) == (2.0, 10.0)


def test_classes_are_reported_by_name() -> None:
    report = classes(classified([True, True, False, True]), ["before", "after"])
    assert report["confusion"] == [[1, 1], [0, 2]]  # document 2 is "before", taken for "after"
    assert report["labels"]["before"] == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2})


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to score"):
        summarise([], METRICS, seed=1)


@given(rows=st.integers(0, 500), samples=st.integers(1, 600), seed=st.integers(0, 2**31))
def test_sampled_rows_are_distinct_and_fixed_by_the_seed(rows: int, samples: int, seed: int) -> None:
    drawn = sampled_rows(rows, samples, seed)
    assert len(drawn) == min(rows, samples) == len(set(drawn.tolist()))
    assert all(0 <= row < rows for row in drawn)
    assert (drawn == sampled_rows(rows, samples, seed)).all()

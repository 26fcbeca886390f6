"""Documents to look at: the worst, the middling and the best, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.data.store import Prepared
from distft.evaluation import DocumentScore, Written, examples
from distft.orchestrate.examples import Results, write_examples
from distft.runs import read_json
from distft.task.metrics import mean_statistics, token_statistics
from distft.task.metrics_classes import class_statistics
from tests.unit.test_writing import ANSWERS, ROWS, folder, run_of

__all__ = ["folder"]  # the fixture


def scored(values: list[float], name: str = "loss") -> list[DocumentScore]:
    return [
        DocumentScore(
            number,
            {"tokens": token_statistics(10 * value, 10, 40)} if name == "loss" else {name: mean_statistics(value)},
        )
        for number, value in enumerate(values)
    ]


def test_low_losses_and_high_scores_are_best() -> None:
    values = [5.0, 1.0, 3.0, 9.0, 2.0, 4.0, 6.0, 7.0, 8.0, 0.5, 2.5]
    found = examples(scored(values), scored([10.0] * len(values)), "loss")
    assert [(one.place, one.tuned) for one in found] == [
        ("worst", 9.0), ("worst", 8.0), ("worst", 7.0),
        ("median", 5.0), ("median", 4.0), ("median", 3.0),
        ("best", 2.0), ("best", 1.0), ("best", 0.5),
    ]  # fmt: skip
    assert {one.base for one in found} == {10.0}
    upwards = examples(scored([value / 10 for value in values], "rouge1"), (), "rouge1")
    assert [one.tuned for one in upwards][:3] == [0.05, 0.1, 0.2]
    assert upwards[0].base is None


@given(st.lists(st.floats(0, 10), max_size=30))
def test_no_document_is_shown_twice(values: list[float]) -> None:
    found = examples(scored(values), (), "loss")
    assert len({one.document for one in found}) == len(found) == min(9, len(values))
    assert all(one.tuned == pytest.approx(values[one.document]) for one in found)


def test_documents_without_the_score_are_passed_over() -> None:
    assert examples(scored([0.1, 0.2], "rouge1"), (), "loss") == []


TASKS: dict[str, dict[str, object]] = {
    "language_modeling": {"kind": "language_modeling"},
    "classification": {"kind": "classification"},
    "generation": ANSWERS,
}


@pytest.mark.usefixtures("module_cache")
@pytest.mark.parametrize("kind", TASKS)
def test_the_words_of_documents_are_those_of_the_data(folder: Path, kind: str) -> None:
    job, run, data = run_of(folder, f"{kind}-examples", TASKS[kind])
    prepared = Prepared.open(data.prepared)
    rows = prepared.rows("train")
    documents = sorted({document for row in rows for document in row.documents})
    make = {
        "language_modeling": lambda one: {"tokens": token_statistics(1.0 + one, 1, 4)},
        "classification": lambda one: {
            "tokens": token_statistics(1.0 + one, 1, 0),
            "classes": class_statistics(0, one % 2, 2),
        },
        "generation": lambda one: {"rougeL": mean_statistics(one / 100)},
    }[kind]
    scores = [DocumentScore(one, make(one)) for one in documents]
    said = [Written(one, "asked", "wanted", f"said {one}", True, 2) for one in documents]
    written = {"best": said if kind == "generation" else []}
    write_examples(job, run, data.model, prepared, Results("train", np.arange(len(rows)), {"best": scores}, written))
    found = read_json(run.examples)["train"]
    assert found["documents"] == len(documents)
    assert [one["place"] for one in found["examples"]] == ["worst"] * 3 + ["median"] * 3 + ["best"] * 3
    texts = [f"{number}: {country}" for number, (country, _) in enumerate(ROWS)]
    for one in found["examples"]:
        text = texts[one["row"] - 1]
        if kind == "generation":
            number = int(one["best"].removeprefix("said "))
            assert (one["text"], one["reference"], prepared.document(number).row) == ("asked", "wanted", one["row"])
        else:
            assert one["text"].strip() == text
        if kind == "classification":
            assert one["reference"] == str(dict(ROWS)[text.partition(": ")[2]][0] in "OPR").lower()
            assert one["best"] in prepared.labels

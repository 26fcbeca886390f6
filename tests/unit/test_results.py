"""What scoring leaves in a run's folder."""

from __future__ import annotations

from pathlib import Path

from distft.config import Job
from distft.evaluation import DocumentScore, Written
from distft.orchestrate.listener import Silent
from distft.orchestrate.results import SHOWN_ANSWERS, _report, _tell
from distft.runs import Run, read_json, read_lines
from distft.task.metrics import token_statistics
from distft.task.metrics_classes import class_statistics


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def answer(document: int, text: str, *, stopped: bool = True, tokens: int = 3) -> Written:
    return Written(document, f"prompt {document}", f"reference {document}", text, stopped, tokens)


def test_the_first_answers_are_kept_for_a_person(tmp_path: Path) -> None:
    run, notes = Run(tmp_path), Notes()
    documents = list(range(70, 10, -2))  # in the order of batches: by length
    written = {model: [answer(number, f"{model} {number}") for number in documents] for model in ("base", "best")}
    for _ in range(2):  # a second scoring takes the first one's place
        _tell(run, written, "test", 8, notes)
    lines = list(read_lines(run.answers))
    assert [line["document"] for line in lines] == sorted(documents)[:SHOWN_ANSWERS]
    assert lines[0] == {
        "split": "test",
        "document": 12,
        "prompt": "prompt 12",
        "reference": "reference 12",
        "base": "base 12",
        "best": "best 12",
    }
    assert notes.told == []


def test_answers_that_the_context_cut_short_are_counted(tmp_path: Path) -> None:
    notes = Notes()
    cut = [answer(1, "", stopped=False, tokens=0), answer(2, "a", stopped=False, tokens=8), answer(3, "b", tokens=2)]
    _tell(Run(tmp_path), {"best": cut}, "test", 8, notes)
    assert notes.told == ["  1 of 3 answers of best end where the model's context is full"]


def classified(predictions: list[int]) -> list[DocumentScore]:
    return [
        DocumentScore(
            number,
            {"classes": class_statistics(number % 2, predicted, 2), "tokens": token_statistics(0.5, 1, 0)},
        )
        for number, predicted in enumerate(predictions)
    ]


def test_scores_and_classes_are_brought_up_to_date(tmp_path: Path) -> None:
    run = Run(tmp_path)
    values = {"model": {"source": "a/b"}, "task": {"kind": "classification"}, "data": {"source": "rows.jsonl"}}
    job, names, labels = Job.from_values(values, tmp_path), ["loss", "accuracy"], ("no", "yes")
    _report(job, run, {"best": classified([0, 1, 0, 0])}, "validation", names, labels)
    scored = {"base": classified([0, 0, 0, 0]), "best": classified([0, 1, 0, 1])}
    found = _report(job, run, scored, "test", names, labels)
    assert found == read_json(run.evaluation)
    assert found["best"]["validation"]["accuracy"]["value"] == 0.75
    assert set(found["best"]["test"]["accuracy"]) == {"value", "low", "high", "n"}
    assert set(found["difference"]["test"]["accuracy"]) == {"value", "low", "high", "n", "p"}
    assert found["difference"]["test"]["accuracy"]["value"] == 0.5
    assert "validation" not in found["difference"]
    assert found["classes"]["best"]["test"]["confusion"] == [[2, 0], [0, 2]]
    assert found["classes"]["base"]["test"]["labels"]["yes"]["recall"] == 0
    assert found["classes"]["best"]["validation"]["confusion"] == [[2, 0], [1, 1]]

"""What a person reads at the end of a run, from numbers as a run leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.cli.tables import class_lines, sample_lines, score_lines, summary, verdict
from distft.config import Job
from distft.runs import Run, append_line, write_json
from distft.task.metrics_classes import class_report, class_statistics
from distft.train.folder import begin


def estimate(value: float, low: float, high: float, n: int = 20, **more: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n, **more}


@pytest.mark.parametrize(
    ("metric", "change", "said"),
    [
        ("perplexity", (-3, -4, -2), "Better than the base model in perplexity:"),
        ("perplexity", (3, 2, 4), "Worse than"),
        ("perplexity", (-1, -2, 0.5), "No clear difference from"),
        ("chrf", (3, 2, 4), "Better than the base model in chrF:"),
        ("exact_match", (-0.2, -0.3, -0.1), "Worse than the base model in exact match:"),
        ("length", (3, 2, 4), ""),
    ],
)
def test_the_verdict_follows_the_interval_and_the_metrics_direction(
    metric: str, change: tuple[float, float, float], said: str
) -> None:
    told = verdict({"difference": {"test": {metric: estimate(*change)}}}, "test", metric)
    assert told.startswith(said)
    assert bool(told) == bool(said)


def test_the_verdict_gives_the_p_value() -> None:
    change = {"test": {"accuracy": estimate(0.26, 0.2, 0.3, p=0.0009995)}}
    assert verdict({"difference": change, "classes": {}}, "test", "accuracy") == (
        "Better than the most common label in accuracy: the interval of the paired difference excludes zero "
        "(p < 0.001)."
    )


def test_scores_stand_beside_each_other() -> None:
    scores = {kind: {"test": {"perplexity": estimate(20, 18, 22)}} for kind in ("base", "best", "difference")}
    title, header, line = score_lines(scores, "test")
    assert title == "Test split, 20 documents, 95 % intervals"
    assert header.split() == ["base", "tuned", "difference", "(paired)"]
    assert line.count("20 (18 to 22)") == 3


def test_answers_to_some_documents_are_said_to_be() -> None:
    tuned = {"loss": estimate(1.5, 1.4, 1.6, 200), "chrf": estimate(41.234, 38, 44.5, 50)}
    lines = score_lines(
        {"best": {"test": tuned, "validation": {}}, "base": {"test": {"loss": estimate(3, 2, 4)}}}, "test"
    )
    assert lines[0] == "Test split, 200 documents, 50 of them answered, 95 % intervals"
    assert lines[3].split() == ["chrF", "(0", "to", "100)", "-", "41.23", "(38", "to", "44.5)"]


CENTURY = class_report(
    np.array([class_statistics(*pair, 2) for pair in [(0, 0)] * 51 + [(0, 1)] * 3 + [(1, 0)] * 4 + [(1, 1)] * 22]),
    ["1900 or after", "before 1900"],
)


def test_classes_have_a_line_each_with_the_confusion_matrix() -> None:
    assert class_lines(CENTURY)[1:] == [
        "  label             precision  recall      F1   texts   taken for   [1]   [2]",
        "  [1] 1900 or after     0.927   0.944   0.936      54                51     3",
        "  [2] before 1900       0.880   0.846   0.863      26                 4    22",
    ]


def test_of_many_classes_the_hardest_are_listed() -> None:
    pairs = [(number, number if number % 7 else (number + 1) % 50) for number in range(50)]
    report = class_report(np.array([class_statistics(*pair, 50) for pair in pairs]), [f"label {n}" for n in range(50)])
    lines = class_lines(report)
    assert "taken for" not in lines[1]
    assert [line.split()[1] for line in lines[2:5]] == ["0", "7", "14"]
    assert lines[-1] == "  ... and 30 labels with a higher F1: evaluation.json has them all"


def finished(tmp_path: Path, kind: str, sample: dict[str, str], scores: dict[str, Any], **task: str) -> str:
    values = {"model": {"source": "a/b"}, "task": {"kind": kind, **task}, "data": {"source": "rows.jsonl"}}
    run = Run(tmp_path / "century")
    begin(Job.from_values(values, tmp_path), run)
    write_json(run.result, {"step": 40, "sample": sample})
    write_json(run.evaluation, scores)
    if kind == "generation":
        append_line(run.answers, {"prompt": "?"})
    return summary(run, Path("launch/century.yaml"))


def test_the_next_commands_find_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was kept elsewhere by --runs, they need it too."""
    sample = {"prompt": "a b", "best": "c"}
    commands = finished(tmp_path, "language_modeling", sample, {}).partition("Next\n")[2].splitlines()
    assert len(commands) == 3
    assert all(command.endswith(f" --runs {tmp_path}") for command in commands)
    monkeypatch.setenv("DISTFT_RUNS", str(tmp_path))
    assert "--runs" not in finished(tmp_path, "language_modeling", sample, {})


def test_a_classifiers_summary(tmp_path: Path) -> None:
    scores = {
        "base": {"test": {"accuracy": estimate(0.675, 0.57, 0.77)}},
        "best": {"test": {"accuracy": estimate(0.9125, 0.85, 0.9625)}},
        "difference": {"test": {"accuracy": estimate(0.2375, 0.13, 0.35, p=0.001)}},
        "classes": {"base": {"test": CENTURY}, "best": {"test": CENTURY}},
    }
    sample = {"prompt": "The tariff\nof this year", "reference": "before 1900", "best": "before 1900 0.97"}
    text = finished(tmp_path, "classification", sample, scores)
    assert "labels' shares" in text
    assert "0.9125 (0.85 to 0.9625)" in text
    assert "Better than the most common label in accuracy" in text
    assert "[2] before 1900" in text
    assert "Prompt  The tariff of this year\n  data  before 1900\n  tuned before 1900 0.97\n" in text
    assert "AutoModelForSequenceClassification" in text
    assert "generate" not in text


def test_the_summary_of_answers(tmp_path: Path) -> None:
    scores = {
        "best": {"test": {"loss": estimate(1, 0.9, 1.1), "chrf": estimate(40, 30, 50), "bleu": estimate(9, 5, 12)}},
        "difference": {"test": {"loss": estimate(-1, -2, -0.5), "chrf": estimate(-2, -5, 1, p=0.2)}},
    }
    sample = {"prompt": "Translate: It's late.", "reference": "Es ist spät.", "base": "It's", "best": "Es ist"}
    text = finished(tmp_path, "generation", sample, scores, preset="translation")
    assert "No clear difference from the base model in chrF" in text
    assert "century --prompt 'Translate: It'\"'\"'s late.'" in text
    assert f"Answers {tmp_path}/century/answers.jsonl" in text


def test_the_summary_of_a_language_model(tmp_path: Path) -> None:
    scores = {"best": {"test": {"perplexity": estimate(20, 18, 22)}}}
    text = finished(tmp_path, "language_modeling", {"prompt": "a b c d e f", "base": "g", "best": "h"}, scores)
    assert "--prompt 'a b c d e' --temperature 0.8" in text
    assert "--set train.steps=120" in text


def test_texts_of_a_sample_are_wrapped_between_words_on_a_terminal() -> None:
    lines = sample_lines({"prompt": "word " * 40, "base": "w" * 20}, 60)
    assert lines[0] == "Prompt  " + " ".join(["word"] * 10)
    assert lines[1] == "        " + " ".join(["word"] * 10)
    assert lines[4:] == ["  base  " + "w" * 20]


def test_scores_stand_below_their_headings() -> None:
    small = estimate(-0.04192, -0.04672, -0.03741)
    scores = {"best": {"test": {"loss": estimate(3, 2, 4)}}, "difference": {"test": {"loss": small}}}
    _, heads, line = score_lines(scores, "test")
    assert heads.index("difference") == line.index("-0.04192")
    assert heads.index("tuned") == line.index("3 (2 to 4)")
    assert len(line) < 80


def test_long_texts_of_a_sample_are_cut() -> None:
    (line,) = sample_lines({"prompt": "word " * 1000})
    assert len(line) == 508
    assert line.endswith("…")

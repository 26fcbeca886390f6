"""Metrics against the libraries whose numbers people know."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sklearn

from distft.config import Job
from distft.config.rules import TASK_METRICS
from distft.task.metrics import METRICS, headline, metrics_of, token_statistics
from distft.task.metrics_classes import bin_statistics, class_report, class_statistics
from distft.task.metrics_text import normalize, text_statistics, token_f1

GERMAN = [
    ("Der Hund läuft über die Straße.", "Ein Hund läuft über die Straße."),
    ("", "Das Feld darf nicht leer sein."),
    ("Bitte geben Sie eine gültige Zahl ein.", "Bitte eine gültige Zahl eingeben."),
    ("Ja", "Ja"),
    ("völlig falsch und viel zu lang, viel zu lang", "richtig"),
    ("Wählen Sie eine gültige Auswahl; '%(value)s' ist keine.", "Bitte eine gültige Auswahl treffen."),
]
ENGLISH = [
    ("Returns the sum of two numbers.", "Return the sum of the two numbers."),
    ("the cat", "The cat sat on the mat; it was a black cat."),
    ("", "Nothing was written."),
    ("Opens a file and reads it.", "Opens a file and reads it."),
]


def value(name: str, statistics: list[np.ndarray]) -> float:
    return float(METRICS[name].value(np.sum(statistics, axis=0)))


def of_pairs(name: str, pairs: list[tuple[str, str]]) -> float:
    return value(name, [text_statistics(answer, reference, [name])[name] for answer, reference in pairs])


@pytest.mark.parametrize("pairs", [GERMAN, ENGLISH, GERMAN[1:2], GERMAN[3:4]])
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    answers, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    assert of_pairs("bleu", pairs) == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score, abs=1e-9)
    assert of_pairs("chrf", pairs) == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score, abs=1e-9)


def test_bleu_of_many_sums_at_once() -> None:
    statistics = np.array([text_statistics(*pair, ["bleu"])["bleu"] for pair in GERMAN])
    stacked = np.stack([statistics.sum(0), statistics[:3].sum(0)])
    expected = [of_pairs("bleu", GERMAN), of_pairs("bleu", GERMAN[:3])]
    assert METRICS["bleu"].value(stacked).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores_mean_f_measure(name: str) -> None:
    scorer = RougeScorer([name])
    expected = np.mean([scorer.score(reference, answer)[name].fmeasure for answer, reference in ENGLISH])
    assert 0 < expected < 1
    assert of_pairs(name, ENGLISH) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [  # the dev set of SQuAD v1.1 (Super Bowl 50), scored with evaluate-v1.1.py
        ("Denver Broncos", "Denver Broncos", 1, 1),
        ("The Denver Broncos.", "Denver Broncos", 1, 1),
        ("the  golden   anniversary", '"golden anniversary"', 1, 1),
        ("Santa Clara", "Santa Clara, California", 0, 0.8),
        ("Levi's Stadium in Santa Clara", "Levi's Stadium", 0, 2 / 3.5),
        ("Carolina Panthers", "Denver Broncos", 0, 0),
        ("", "gold", 0, 0),
        ("The", "a", 1, 1),
        ("gold gold gold", "gold", 0, 0.5),
    ],
)
def test_exact_match_and_token_f1_are_squads(answer: str, reference: str, exact: float, f1: float) -> None:
    assert of_pairs("exact_match", [(answer, reference)]) == exact
    assert of_pairs("token_f1", [(answer, reference)]) == pytest.approx(f1) == token_f1(answer, reference)


def test_normalization_keeps_what_only_looks_like_an_article() -> None:
    assert normalize("The  Theatre: an 'A'-list\tanthem, a-b") == "theatre alist anthem ab"


@pytest.mark.parametrize("classes", [2, 5])
def test_class_metrics_are_scikit_learns(classes: int) -> None:
    draw = random.Random(classes)
    truths = draw.choices(range(classes - 1), k=200)  # the last class is never true
    predictions = [truth if draw.random() < 0.6 else draw.randrange(classes) for truth in truths]
    statistics = [class_statistics(*pair, classes) for pair in zip(truths, predictions, strict=True)]
    assert value("accuracy", statistics) == pytest.approx(sklearn.accuracy_score(truths, predictions))
    assert value("macro_f1", statistics) == pytest.approx(sklearn.f1_score(truths, predictions, average="macro"))
    names = [f"label {number}" for number in range(classes)]
    report = class_report(np.array(statistics), names)
    assert report["confusion"] == sklearn.confusion_matrix(truths, predictions, labels=range(classes)).tolist()
    rows = sklearn.precision_recall_fscore_support(truths, predictions, labels=range(classes), zero_division=0)
    for name, *expected in zip(names, *rows, strict=True):
        assert list(report["labels"][name].values()) == pytest.approx(expected)


def test_a_class_that_is_neither_true_nor_predicted_does_not_count() -> None:
    statistics = [class_statistics(0, 0, 3), class_statistics(1, 1, 3)]
    assert value("macro_f1", statistics) == 1


def test_calibration_error_by_hand() -> None:
    """Two bins: confidences 0.9 and 0.92 with one hit of two; 0.5 with one hit of one."""
    statistics = [bin_statistics(True, 0.9), bin_statistics(False, 0.92), bin_statistics(True, 0.5)]
    expected = 2 / 3 * abs(0.91 - 0.5) + 1 / 3 * abs(0.5 - 1)
    assert value("calibration_error", statistics) == pytest.approx(expected)
    assert value("calibration_error", [bin_statistics(True, 1.0)]) == 0
    assert value("calibration_error", [bin_statistics(False, 1 / 15), bin_statistics(True, 1e-9)]) == pytest.approx(
        abs(1 - 1 / 15) / 2, abs=1e-6
    )  # both in the first bin, whose upper edge is in it


def test_losses_are_ratios_of_sums() -> None:
    statistics = [token_statistics(200.0, 100, 400), token_statistics(30.0, 10, 50)]
    assert value("loss", statistics) == pytest.approx(230 / 110)
    assert value("perplexity", statistics) == pytest.approx(math.exp(230 / 110))
    assert value("bits_per_byte", statistics) == pytest.approx(230 / math.log(2) / 450)


def job(*settings: str, **task: str) -> Job:
    values = {"model": {"source": "a/b"}, "task": task, "data": {"source": "rows.jsonl"}}
    return Job.from_values(values, Path(), settings)


def test_each_task_has_its_metrics() -> None:
    assert metrics_of(job(kind="language_modeling")) == ("loss", "perplexity", "bits_per_byte")
    assert headline(job(kind="language_modeling")) == "perplexity"
    assert metrics_of(job(kind="classification")) == ("loss", "accuracy", "macro_f1", "calibration_error")
    assert headline(job(kind="classification")) == "accuracy"
    for preset, first, others in [
        ("translation", "chrf", {"bleu"}),
        ("summarization", "rouge1", {"rouge2", "rougeL"}),
        ("question_answering", "exact_match", {"token_f1"}),
        ("chat", "rougeL", {"chrf"}),
    ]:
        made = job(kind="generation", preset=preset, **({"messages": "m"} if preset == "chat" else {}))
        assert set(metrics_of(made)) == {"loss", "perplexity", first, "stop_rate", "length", *others}
        assert headline(made) == first


def test_metrics_that_are_asked_for_stand() -> None:
    made = job("evaluate.metrics=[loss, stop_rate]", kind="generation", prompt="{a}", response="{b}")
    assert metrics_of(made) == ("loss", "stop_rate")
    assert headline(made) == "stop_rate"


def test_every_metric_of_the_job_file_is_there() -> None:
    assert METRICS.keys() == {name for names in TASK_METRICS.values() for name in names}

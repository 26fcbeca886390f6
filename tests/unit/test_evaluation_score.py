"""Scoring tiny models of each task on prepared rows: by hand, and dealt to any number of workers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from distft.data.store import Prepared
from distft.evaluation import Scored, Subject, Unit, deal, guesses, merge, questions, score, summarise, units
from distft.model import load_classifier, load_tokenizer, pad_id
from distft.task.metrics import metrics_of
from distft.task.prepare import prepare
from tests.distributed import tiny

COUNTRIES = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Norway": "Oslo", "Egypt": "Cairo"}


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scored")
    tiny.make_model(made / "model")
    draw = random.Random(1)
    with (made / "rows.jsonl").open("w") as file:
        for number in range(100):
            country = draw.choice(list(COUNTRIES))
            row = {"text": f"{number} {' '.join(draw.choices(tiny.WORDS, k=number % 9 + 1))}"}
            row |= {
                "label": ["peace", "war", "trade"][number % 3],
                "q": f"{number} {country}?",
                "a": COUNTRIES[country],
            }
            file.write(json.dumps(row) + "\n")
    return made


TASKS = {
    "language_modeling": {"kind": "language_modeling"},
    "classification": {"kind": "classification"},
    "generation": {"kind": "generation", "prompt": "Capital of {q} ", "response": "{a}"},
}


def setting(folder: Path, kind: str, model: Path | None = None) -> tuple[Subject, Prepared]:
    data = {"source": "rows.jsonl", "max_tokens": 64, "splits": {"test": 0.5}}
    job = tiny.job(folder, task=TASKS[kind], data=data)
    prepared = prepare(job, folder / "model")
    subject = Subject(model or folder / "model", prepared, "test", kind, "fp32", metrics_of(job), 6)
    return subject, Prepared.open(prepared)


def work_of(prepared: Prepared, subject: Subject, samples: int = 100) -> list[Unit]:
    rows = prepared.rows("test")
    answers = subject.max_new_tokens if subject.kind == "generation" else None
    return units(rows, np.arange(len(rows)), samples=samples, seed=3, max_new_tokens=answers)


def flat(found: list[Scored]) -> dict[int, dict[str, list[float]]]:
    merged = merge(score for part in found for score in part.scores)
    return {one.document: {name: value.tolist() for name, value in one.statistics.items()} for one in merged}


@pytest.mark.parametrize("kind", TASKS)
def test_scores_do_not_depend_on_the_number_of_workers(folder: Path, kind: str) -> None:
    model = classifier(folder) if kind == "classification" else None
    subject, prepared = setting(folder, kind, model)
    work = work_of(prepared, subject)
    assert len(work) > 3
    alone = list(score(subject, work))
    for workers in (2, 3):
        shares = deal(work, workers)
        assert len(shares) == min(workers, len(work))
        assert flat([part for share in shares for part in score(subject, share)]) == flat(alone)
    found = summarise(merge(one for part in alone for one in part.scores), subject.metrics, seed=1)
    documents = len(prepared.documents("test"))
    assert {estimate.n for estimate in found.values()} == {documents}


def classifier(folder: Path) -> Path:
    made = folder / "classifier"
    if not made.exists():
        tokenizer = load_tokenizer(folder / "model")
        model = load_classifier(
            folder / "model", torch.float32, labels=["peace", "trade", "war"], seed=5, pad_id=pad_id(tokenizer)
        )
        model.score.weight.data *= 10  # a fresh head says much the same of every text
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return made


def test_class_scores_are_those_of_transformers(folder: Path) -> None:
    """Each text alone through the model's own forward gives what packed rows give."""
    subject, prepared = setting(folder, "classification", classifier(folder))
    found = flat(list(score(subject, work_of(prepared, subject))))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier(folder)).eval()
    texts = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    predicted = set()
    for document in prepared.documents("test"):
        row = texts[document.row - 1]
        ids = load_tokenizer(folder / "model")(row["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].double().softmax(0).numpy()
        truth = model.config.label2id[row["label"]]
        assert found[document.index]["tokens"] == pytest.approx([-np.log(chances[truth]), 1, 0], rel=1e-4, abs=1e-6)
        hits, true, guessed = np.array(found[document.index]["classes"]).reshape(3, 3)
        assert (true.argmax(), guessed.argmax()) == (truth, chances.argmax())
        assert hits.sum() == (truth == chances.argmax())
        predicted.add(int(guessed.argmax()))
    assert len(predicted) > 1


def test_a_classifiers_base_is_the_labels_shares(folder: Path) -> None:
    _, prepared = setting(folder, "classification")
    rows = prepared.rows("test")
    seen = {"peace": 5, "war": 1}
    found = guesses(rows, np.arange(len(rows)), prepared.labels, seen)
    values = summarise(found[0].scores, ["accuracy", "loss"], seed=1)
    counts = prepared.card["labels"]["rows"]["test"]
    total = sum(counts.values())
    shares = {"peace": 6 / 9, "trade": 1 / 9, "war": 2 / 9}
    assert values["accuracy"].value == pytest.approx(counts["peace"] / total)
    expected = -sum(count * np.log(shares[label]) for label, count in counts.items()) / total
    assert values["loss"].value == pytest.approx(expected)


def test_questions_are_the_datas_prompts_and_answers(folder: Path) -> None:
    _, prepared = setting(folder, "generation")
    tokenizer = load_tokenizer(folder / "model")
    rows = prepared.rows("test")
    found = questions(rows, np.arange(len(rows)))
    assert len(found) == len(prepared.documents("test"))
    texts = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    places = {document.index: document.row - 1 for document in prepared.documents("test")}
    for question in found:
        row = texts[places[question.document]]
        assert tokenizer.decode(question.prompt) == f"Capital of {row['q']} "
        assert tokenizer.decode(question.reference) == f"{row['a']}<|endoftext|>"


def test_of_many_questions_some_are_drawn(folder: Path) -> None:
    subject, prepared = setting(folder, "generation")
    asked = [[q.document for unit in work_of(prepared, subject, samples=n) for q in unit.questions] for n in (5, 5, 6)]
    assert asked[0] == asked[1]
    assert [len(set(documents)) for documents in asked] == [5, 5, 6]


def test_written_answers_are_kept(folder: Path) -> None:
    subject, prepared = setting(folder, "generation")
    work = [unit for unit in work_of(prepared, subject, samples=4) if unit.questions]
    written = [one for part in score(subject, work) for one in part.written]
    assert len(written) == 4
    for one in written:
        assert one.prompt.startswith("Capital of ")
        assert one.reference in COUNTRIES.values()
        assert one.stopped or one.tokens == 6

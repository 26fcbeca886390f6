"""Answers for metrics: those of two workers, of a model trained by two ZeRO-3 ranks, are those of one process."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.checkpoint import complete, signing_key, storage_of
from distft.config import Job
from distft.data.store import Prepared
from distft.evaluation import Subject, Unit, deal, score, units
from distft.export import export
from distft.runs import Run
from distft.task.metrics import metrics_of
from distft.world import World
from tests.distributed import tiny
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

NEW_TOKENS = 10


def job_of(folder: Path, *settings: str) -> Job:
    return tiny.job(
        folder,
        "train.epochs=null",
        "train.steps=30",
        "train.learning_rate=0.01",
        *settings,
        task={"kind": "generation", "prompt": "{text} is ", "response": "{answer}"},
        data={"source": "questions.jsonl", "max_tokens": 64, "splits": {"validation": 0.2, "test": 0.4}},
        evaluate={"metrics": ["loss", "chrf", "bleu", "rougeL", "exact_match", "token_f1", "stop_rate", "length"]},
    )


def train(folder: str, name: str, prepared: str) -> None:
    """As this process's rank: alone without ZeRO, else at stage 3."""
    from distft.train.worker import work

    home, world = Path(folder), World.from_environment()
    job = job_of(home, f"zero.stage={0 if world.size == 1 else 3}")
    work(job, world, tiny.run_of(home, name), Path(prepared), home / "model")


def share_of(folder: str, model: str, prepared: str) -> dict[str, Any]:
    """What this process's rank writes and scores of the test split."""
    world = World.from_environment()
    job, rows = job_of(Path(folder)), Prepared.open(Path(prepared)).rows("test")
    subject = Subject(Path(model), Path(prepared), "test", "generation", "fp32", metrics_of(job), NEW_TOKENS)
    work: list[Unit] = units(rows, np.arange(len(rows)), samples=50, seed=1, max_new_tokens=NEW_TOKENS)
    found = list(score(subject, deal(work, world.size)[world.rank]))
    scores = [
        (one.document, {name: values.tolist() for name, values in one.statistics.items()})
        for part in found
        for one in part.scores
    ]
    return {"scores": scores, "written": [asdict(one) for part in found for one in part.written]}


def joined(shares: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    scores = sorted(json.dumps(one) for share in shares for one in share["scores"])
    return scores, sorted((one for share in shares for one in share["written"]), key=lambda one: one["document"])


@pytest.fixture(scope="module")
def folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("answers")
    shutil.copytree(made / "model", home / "model")
    with (home / "questions.jsonl").open("w") as file:
        for number in range(90):
            word, answer = [("peace", "good"), ("war", "bad"), ("trade", "fair")][number % 3]
            file.write(json.dumps({"text": f"{'x' * (number % 11)}{number} {word}", "answer": answer}) + "\n")
    return home


def test_generation_metrics_under_zero_3_with_two_workers_are_those_of_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distft.task.prepare import prepare

    monkeypatch.setenv("DISTFT_CACHE", str(folder / "cache"))
    prepared = prepare(job_of(folder), folder / "model")
    found = {}
    for name, ranks in (("alone", 1), ("zero-3", 2)):
        run_ranks(train, ranks, str(folder), name, str(prepared))
        run = Run(folder / "runs" / name)
        storage = storage_of(job_of(folder), run)
        checkpoint = complete(storage, signing_key(run, storage))[0]
        model = export(job_of(folder), folder / "model", checkpoint, folder / f"export-{name}", dtype="fp32")
        found[name] = {
            workers: joined(run_ranks(share_of, workers, str(folder), str(model), str(prepared)))
            for workers in {1, ranks}
        }
    assert found["zero-3"][1] == found["zero-3"][2]  # the same model: every digit
    alone, sharded = found["alone"][1][1], found["zero-3"][2][1]
    assert sharded == alone
    assert len({one["answer"] for one in alone}) > 1
    assert {one["reference"] for one in alone} == {"good", "bad", "fair"}
    assert any(one["stopped"] for one in alone)

"""A real classifier: paragraphs of State of the Union addresses, before 1900 or later, whole addresses held out.

``python benchmarks/classify.py`` (after ``make launch-data``) fine-tunes SmolLM2-135M with LoRA as
``launch/classify.yaml`` says, for more steps, on two ZeRO workers; beside it, on the same splits, stand the majority
and TF-IDF with logistic regression, which has seen all training paragraphs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from distft.config import Job  # noqa: E402
from distft.data.store import Prepared  # noqa: E402
from distft.model import materialise  # noqa: E402
from distft.runs import read_json, read_lines  # noqa: E402
from distft.task.prepare import prepare  # noqa: E402

JOB = ROOT / "launch" / "classify.yaml"
BASELINE = ROOT / "benchmarks" / "baselines" / "classify.json"
ROWS = ROOT / "launch" / "data" / "classify.jsonl"


def texts(prepared: Prepared, split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    chosen = [rows[document.row - 1] for document in prepared.documents(split)]
    return [row["text"] for row in chosen], [row["label"] for row in chosen]


def peers(prepared: Prepared) -> dict[str, Any]:
    """Accuracy on the whole test split of the majority and of TF-IDF with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = texts(prepared, "train"), texts(prepared, "test")
    majority, _ = Counter(train[1]).most_common(1)[0]
    words = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2), LogisticRegression(C=10))
    return {
        "train_paragraphs": len(train[0]),
        "test_paragraphs": len(test[0]),
        "majority": sum(label == majority for label in test[1]) / len(test[1]),
        "tf_idf_logistic_regression": float(words.fit(*train).score(*test)),
    }


def main() -> None:
    """Runs all and writes ``benchmarks/baselines/classify.json``, keeping what it knows of other numbers of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    job = Job.load(JOB)
    settings = [f"train.steps={arguments.steps}", "evaluate.samples=120"]
    prepared = Prepared.open(prepare(job, materialise(job.model, job.folder)))
    with tempfile.TemporaryDirectory() as runs:
        options = [word for setting in settings for word in ("--set", setting)]
        start = time.time()
        subprocess.run(
            [sys.executable, "-m", "distft", "run", str(JOB), "--runs", runs, *options], check=True, cwd=ROOT
        )
        seconds = time.time() - start
        run = Path(runs) / job.name
        steps = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"]
        result = {
            "settings": settings,
            "whole_run_seconds": seconds,
            "train_seconds": sum(line["step_seconds"] for line in steps),
            "examples_trained_on": sum(line["supervised_tokens"] for line in steps),
            "tokens_trained_on": sum(line["tokens"] for line in steps),
            "scores": read_json(run / "evaluation.json"),
        }
    result["peers_on_the_whole_test_split"] = peers(prepared)
    known = read_json(BASELINE) if BASELINE.exists() else {}
    known[f"{arguments.steps} steps"] = {"provenance": provenance(), **result}
    BASELINE.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Run folders as training, evaluation and search leave them, made of numbers instead of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distft.config import Job
from distft.config.search import SearchSection
from distft.data.card import length_statistics
from distft.runs import Run, append_line, update_result, write_json
from distft.task.metrics_classes import class_report, class_statistics
from distft.train.folder import begin
from distft.tuning.summary import summary
from distft.tuning.trials import Trial, write_trials

BEGAN = 1_790_000_000.0
TASKS: dict[str, dict[str, Any]] = {
    "language_modeling": {"kind": "language_modeling"},
    "generation": {"kind": "generation", "preset": "translation", "prompt": "To German: {en}", "response": "{de}"},
    "classification": {"kind": "classification"},
}
LABELS = ["sea", "wind", "storm & <b>rain</b>"]


def job_of(kind: str, folder: Path, **more: Any) -> Job:
    values = {"model": {"source": "org/model"}, "task": TASKS[kind], "data": {"source": "rows.jsonl"}, **more}
    return Job.from_values(values, folder)


def training_lines(steps: int, *, workers: int = 2, kill: int | None = None, resize: int | None = None) -> list[Any]:
    """``metrics.jsonl`` of a run, which may be killed after a step, three of which are lost, and may shrink to 1.

    Args:
        steps: Its steps, of a second each.
        workers: Its ranks.
        kill: The step after which it is killed.
        resize: The step after which it goes on with one worker.
    """
    draw, now, lines = np.random.default_rng(1), BEGAN, []

    def tell(kind: str, step: int, **fields: Any) -> None:
        lines.append({"kind": kind, "time": now, "step": step, **fields})

    def started(name: str, step: int) -> None:
        nonlocal now
        now += 10
        tell("event", step, event=name, reason=f"{steps:,} steps on {workers} workers", seconds=10.0, workers=workers)

    started("start", 0)
    validate, step = max(1, steps // 4), 0
    while step < steps:
        step += 1
        now += 1.0
        memory = [2_000_000_000 + 1_000_000 * step % 7 + 50_000_000 * rank for rank in range(workers)]
        tell(
            "train",
            step,
            steps=steps,
            epoch=step / steps,
            loss=2 + 2 * float(np.exp(-5 * step / steps)) + float(draw.normal(0, 0.1)),
            learning_rate=1e-3 * (1 - step / (steps + 1)),
            grad_norm=float(draw.lognormal(0, 0.5)),
            rows=8,
            tokens=4096,
            supervised_tokens=4000,
            step_seconds=1.0,
            data_seconds=0.01,
            tokens_per_second=4096 * float(draw.normal(1, 0.05)),
            mfu=0.4,
            peak_memory_bytes=max(memory),
            rank_peak_memory_bytes=memory,
            world_size=workers,
            micro_batch_size=2,
            accumulation=2,
            sample_digest=f"{step:032x}",
        )
        if step % validate == 0:
            now += 2
            loss = 2.1 + float(np.exp(-5 * step / steps))
            tell("validation", step, loss=loss, accuracy=1 / loss, supervised_tokens=900, seconds=2.0)
            tell("event", step, event="best", reason=f"validation loss {loss:.6f}")
            now += 0.2
            tell("event", step, event="checkpoint", reason="9 bytes in step", bytes=9, blocking_seconds=0.2)
        if step == kill:
            kill = None
            now += 1
            tell("event", step, event="lost", reason="rank 1 is gone <script>alert(1)</script>")
            step = max(0, step - 3)
            started("restart", step)
        elif step == resize:
            resize, workers = None, 1
            started("resize", step)
    tell("event", steps, event="finished", reason=f"all {steps:,} steps")
    return lines


def estimate(value: float, width: float, n: int = 80, **more: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width, "n": n, **more}


def scores(**changes: tuple[float, float]) -> dict[str, Any]:
    """``evaluation.json`` of metrics with their difference and half of its interval; the base has 10 of each."""
    return {
        "base": {"test": {name: estimate(10, 1) for name in changes}},
        "best": {
            "test": {name: estimate(10 + by, 1) for name, (by, _) in changes.items()},
            "validation": {name: estimate(10 + by, 1) for name, (by, _) in changes.items()},
        },
        "difference": {"test": {name: estimate(by, width, p=0.002) for name, (by, width) in changes.items()}},
    }


CHANGES = {
    "language_modeling": {"loss": (-0.5, 0.1), "perplexity": (-4.0, 0.5), "bits_per_byte": (-0.1, 0.02)},
    "generation": {"loss": (-0.5, 0.1), "chrf": (5.0, 1.0), "stop_rate": (-0.2, 0.5), "length": (3.0, 9.0)},
    "classification": {"loss": (-0.5, 0.1), "accuracy": (0.3, 0.1), "macro_f1": (0.2, 0.1)},
}


def card(kind: str, text: str) -> dict[str, Any]:
    """A data card with leaks in both kinds, whose texts are ``text``."""
    place = {"source": f"{text}.jsonl", "row": 1234, "text": text}
    leaked = {
        "first": {"split": "train", **place},
        "second": {"split": "test", **place},
        "similarity": 0.91,
    }
    splits = {"train": 900, "validation": 50, "test": 50}
    return {
        "fingerprint": "5f3e" * 8,
        "source": {"files": 2, "bytes": 123_456, "rows": 1000},
        "task": {"template": text},
        "rows": {split: {"kept": count - 1, "truncated": 1} for split, count in splits.items()},
        "packed": splits,
        "tokens": {
            split: {"padding": count, "all": 90 * count, "supervised": 80 * count} for split, count in splits.items()
        },
        "labels": {
            "names": LABELS if kind == "classification" else [],
            "rows": {split: dict.fromkeys(LABELS, count // 3) for split, count in splits.items()},
        },
        "lengths": length_statistics(np.random.default_rng(2).lognormal(5, 1, 1000).astype(np.int32)),
        "cut": {"train": {"documents": 1, "tokens": 17}},
        "examples": {"truncated": [{"source": f"{text}.jsonl", "row": 7}]},
        "leaks": {
            "exact": {"within": dict.fromkeys(splits, 0), "documents": 1, "pairs": 1, "listed": [leaked]},
            "near": {"threshold": 0.8, "documents": 1, "pairs": 1, "listed": [leaked]},
        },
    }


def shown(kind: str, text: str) -> dict[str, Any]:
    """``examples.json``: nine documents, whose words are ``text``."""
    ones = [
        {
            "place": place,
            "source": "rows.jsonl",
            "row": number,
            "text": f"{text} {number}",
            **({} if kind == "language_modeling" else {"reference": text, "best": f"tuned {text}"}),
            **({"base": f"base {text}"} if kind == "generation" else {}),
            "base_value": 3.0,
            "best_value": 2.0 + number / 10,
        }
        for place in ("worst", "median", "best")
        for number in range(1, 4)
    ]
    metric = "chrf" if kind == "generation" else "loss"
    return {"test": {"metric": metric, "documents": 80, "examples": ones}}


def trials(count: int) -> list[Trial]:
    """Trials of a search over two settings, the third of them failed."""
    draw, made = np.random.default_rng(3), []
    for number in range(count):
        rate = float(10 ** draw.uniform(-5, -2))
        params = {"train.learning_rate": rate, "train.batch_size": int(draw.choice([8, 16]))}
        worst = abs(np.log10(rate) + 3.5)
        values = tuple((1000 * turn, float(2 + worst + 1 / turn)) for turn in range(1, 5 if worst < 1 else 3))
        trial = Trial(f"{number:03d}", params, "finished" if worst < 1 else "stopped", 10, 4000, seconds=12.5)
        made.append(trial.with_values(values, "min"))
    failed = Trial("999", {"train.learning_rate": 1e-2, "train.batch_size": 8}, "failed", reason="<i>nan</i> at step 2")
    return [*made, failed]


def run_of(
    kind: str,
    folder: Path,
    *,
    steps: int = 60,
    text: str = "a quiet sea",
    status: str = "finished",
    searched: int = 0,
    **lines: Any,
) -> Run:
    """A whole run's folder.

    Args:
        kind: The task's.
        folder: Where it is made.
        steps: Its steps.
        text: The words of its data.
        status: How it ended; only a finished one was exported and scored.
        searched: Trials of its search.
        lines: As of :func:`training_lines`.
    """
    space = {"train.learning_rate": {"log_uniform": [1e-5, 1e-2]}, "train.batch_size": {"choice": [8, 16]}}
    search = {"search": {"space": space, "trials": searched}} if searched else {}
    run = Run(folder)
    job = job_of(kind, folder.parent, **search)
    begin(job, run)
    decisions = {
        "zero.stage": {"value": 2, "reason": "set in the job"},
        "model.dtype": {"value": "bf16", "reason": text},
    }
    write_json(run.resolved, {**json.loads(run.resolved.read_text()), "decisions": decisions})
    write_json(run.card, card(kind, text))
    with run.metrics.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in training_lines(steps, **lines))
    update_result(run, status=status, reason=None, step=steps, best_step=steps // 4 * 4, wall_seconds=steps * 1.5)
    if searched:
        section = SearchSection.model_validate(search["search"])
        write_trials(run.trials, trials(searched))
        importance = {"train.learning_rate": 0.9, "train.batch_size": 0.1}
        write_json(run.search_summary, summary(section, trials(searched), importance=importance))
    if status != "finished":
        return run
    report = scores(**CHANGES[kind])
    if kind == "classification":
        pairs = [(0, 0)] * 30 + [(0, 1)] * 4 + [(1, 1)] * 20 + [(2, 1)] * 6 + [(2, 2)] * 20
        made = class_report(np.stack([class_statistics(*pair, 3) for pair in pairs]), LABELS)
        report["classes"] = {"best": {"test": made}}
    write_json(run.evaluation, report)
    write_json(run.examples, shown(kind, text))
    if kind == "generation":
        append_line(run.answers, {"split": "test", "document": 3, "prompt": text, "reference": text, "best": text})
    run.export.mkdir()
    write_json(run.export / "config.json", {})
    write_json(run.export / "distft.json", {})
    looks = [{"time": BEGAN, "model": model} for model in ("base", "best")]
    sample = {"prompt": text, "best": f"{text} and its waves"}
    update_result(run, test_looks=looks, sample=sample)
    return run

"""What comes after training: the exported model, its scores beside the base model's, and text."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distft import evaluation
from distft import model as models
from distft.checkpoint import best, checkpoints_folder, complete
from distft.config import Job
from distft.data.order import sampled_rows
from distft.data.store import Prepared
from distft.errors import CheckpointError, JobError
from distft.export import export as write_export
from distft.orchestrate.cluster import Node, connected, worker_resources
from distft.orchestrate.data import Data, prepare
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.score import score_on_cluster
from distft.runs import Run, append_line, decision, event, read_json, update_result, write_json
from distft.train.folder import job_of


def export(run: Run, *, to: Path | None = None, step: int | None = None, listener: Listener = SILENT) -> Path:
    """Writes the best checkpoint, or that of ``step``, as a Hugging Face folder.

    Raises:
        CheckpointError: There is none to export.
    """
    listener.stage("export")
    job = job_of(run)
    root = checkpoints_folder(job, run)
    checkpoint = best(root) if step is None else next((one for one in complete(root) if one.step == step), None)
    if checkpoint is None:
        raise CheckpointError("there is no complete checkpoint to export", where=str(root), fix="train the run first")
    folder = write_export(
        job,
        models.materialise(job.model, job.folder),
        checkpoint,
        (to or run.export).resolve(),
        dtype=decision(run, "model.dtype"),
        scores=read_json(run.evaluation) if run.evaluation.exists() else None,
    )
    append_line(run.metrics, event("export", checkpoint.step, str(folder)))
    return folder


def evaluate_all(job: Job, run: Run, data: Data, nodes: list[Node], listener: Listener) -> None:
    """Base beside best on the sealed test split, and best on validation."""
    splits = [split for split in ("test", "validation") if len(Prepared.open(data.prepared).rows(split))]
    for split in splits:
        listener.stage(f"evaluate on {split}")
        compared = ["base", "best"] if job.evaluate.compare_base and split == "test" else ["best"]
        _score(job, run, data, nodes, compared, split)


def evaluate(run: Run, *, split: str = "test", model: str = "best", listener: Listener = SILENT) -> dict[str, Any]:
    """Scores one model of a run on one split, with the base model beside it where the job compares them.

    Args:
        run: A trained run.
        split: "validation" or "test"; each look at the test split is recorded in ``result.json``.
        model: "base", "best" (the export) or "last" (the newest checkpoint).
        listener: Who is told.

    Returns:
        ``evaluation.json``, which is brought up to date.
    """
    job = job_of(run)
    listener.stage("cluster")
    with connected(job) as nodes:
        data = prepare(job, listener)
        listener.stage(f"evaluate on {split}")
        compared = ["base", model] if job.evaluate.compare_base and model != "base" else [model]
        return _score(job, run, data, nodes, compared, split)


def _score(job: Job, run: Run, data: Data, nodes: list[Node], compared: list[str], split: str) -> dict[str, Any]:
    """Scores ``compared`` on the cluster's workers and brings ``evaluation.json`` up to date."""
    rows = Prepared.open(data.prepared).rows(split)
    if not len(rows):
        raise JobError(f"the job has no {split} split", where=f"data.splits.{split}", fix="give it a share above 0")
    indices = sampled_rows(len(rows), job.evaluate.samples, job.seed)
    names = evaluation.METRICS if job.evaluate.metrics == "default" else job.evaluate.metrics
    if split == "test":
        looks = [{"time": time.time(), "model": model} for model in compared]
        update_result(run, test_looks=read_json(run.result)["test_looks"] + looks)
    report: dict[str, Any] = read_json(run.evaluation) if run.evaluation.exists() else {}
    with tempfile.TemporaryDirectory(dir=run.folder) as temporary:  # where every node sees it
        folders = {model: _model_folder(run, data, model, Path(temporary)) for model in compared}
        results = score_on_cluster(
            list(folders.values()),
            data.prepared,
            split,
            indices,
            decision(run, "model.dtype"),
            job,
            worker_resources(job, nodes),
        )
        scored = dict(zip(folders, results, strict=True))
    for model, scores in scored.items():
        report.setdefault(model, {})[split] = _as_json(evaluation.summarise(scores, names, job.seed))
    if {"base", "best"} <= scored.keys():
        change = evaluation.difference(scored["base"], scored["best"], names, job.seed)
        report.setdefault("difference", {})[split] = _as_json(change)
    write_json(run.evaluation, report)
    return report


def _as_json(estimates: dict[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}


def _model_folder(run: Run, data: Data, model: str, temporary: Path) -> Path:
    """Where the base model, the export, or the newest checkpoint (exported to ``temporary``) lies."""
    if model == "base":
        return data.model
    if model == "last":
        return export(run, to=temporary / "last", step=read_json(run.result)["step"])
    if not (run.export / "config.json").exists():
        return export(run)
    return run.export


def generate(
    run: Run,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    model: str = "best",
) -> Iterator[str]:
    """Continues ``prompt`` with a run's exported model, or its base; yields the text in pieces."""
    job = job_of(run)
    if model == "best" and not (run.export / "config.json").exists():
        raise JobError(f"{run.name} has no exported model", where=str(run.export), fix=f"distft export {run.name}")
    folder = run.export if model == "best" else models.materialise(job.model, job.folder)
    trust = job.model.trust_remote_code
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    loaded = models.load_model(folder, models.DTYPES[decision(run, "model.dtype")], trust_remote_code=trust)
    yield from models.generate(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


#: The words of a validation document that both models continue at the end of a run, and the tokens that they write.
SAMPLE_PROMPT_WORDS, SAMPLE_TOKENS = 16, 48


def sample(job: Job, run: Run, data: Data) -> dict[str, str]:
    """The start of a validation document (a training one where there is none) continued by base and tuned model."""
    prepared = Prepared.open(data.prepared)
    rows = next(rows for rows in (prepared.rows("validation"), prepared.rows("train")) if len(rows))
    text = models.load_tokenizer(data.model).decode(
        rows[0].input_ids[: 4 * SAMPLE_PROMPT_WORDS], skip_special_tokens=True
    )
    prompt = " ".join(text.split()[:SAMPLE_PROMPT_WORDS])
    written = {
        model: "".join(generate(run, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.0, seed=job.seed, model=model))
        for model in ("base", "best")
    }
    return {"prompt": prompt, **written}

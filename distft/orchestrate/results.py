"""What comes after training: the exported model, and its scores beside the base model's."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft import evaluation
from distft import model as models
from distft.certificate.shared import ADAPTER
from distft.checkpoint import Checkpoint, best, complete, newest_sound, signing_key, storage_of, verify
from distft.config import Job
from distft.data.order import sampled_rows
from distft.data.store import Prepared
from distft.errors import CheckpointError, DataError, JobError
from distft.evaluation import DocumentScore, Estimate, Scored, Subject, Written
from distft.export import export as write_export
from distft.export import export_base as write_base
from distft.export import write_card
from distft.ledger.plan import plan_of
from distft.orchestrate.cluster import Node, connected, worker_resources
from distft.orchestrate.data import Data, prepare
from distft.orchestrate.examples import Results, write_examples
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.score import score_on_cluster
from distft.runs import Run, append_line, decision, event, read_json, update_result, write_json
from distft.task.metrics import METRICS, metrics_of
from distft.train.folder import job_of


def export(
    run: Run, *, to: Path | None = None, step: int | None = None, merge: bool = True, listener: Listener = SILENT
) -> Path:
    """Writes the best checkpoint, or that of ``step``, as a Hugging Face folder.

    Args:
        run: A trained run.
        to: The folder to write; the run's ``export``, or its ``adapter``, where it is None.
        step: The checkpoint; the best one where it is None.
        merge: Whether an adapter is merged into the model; False writes the adapter alone.
        listener: Who is told.

    Raises:
        CheckpointError: There is none to export.
        JobError: The adapter is asked for, and there is none.
    """
    listener.stage("export")
    job = job_of(run)
    checkpoint = _checkpoint(job, run, step)
    prepared = _prepared(job, run, listener) if merge else None
    with checkpoint.shards():  # those in a bucket are fetched once
        verify(checkpoint)
        folder = write_export(
            job,
            models.materialise(job.model, job.folder),
            checkpoint,
            (to or (run.export if merge else run.folder / ADAPTER)).resolve(),
            dtype=decision(run, "model.dtype"),
            merge=merge,
            scores=read_json(run.evaluation) if run.evaluation.exists() else None,
            prepared=prepared,
        )
    append_line(run.metrics, event("export", checkpoint.step, str(folder)))
    return folder


def export_base(run: Run, listener: Listener = SILENT) -> Path:
    """Writes the model that the run began with, to be served beside the one that it made; kept in the run's ``base``.

    Raises:
        JobError: The run is of a classifier, whose base tells no labels, or its data is gone.
    """
    job = job_of(run)
    if job.task.kind == "classification":
        raise JobError("the base model has no head that tells labels", where="--base", fix="serve the run alone")
    if not (run.base / "config.json").is_file():
        listener.stage("export the base model")
        prepared = _prepared(job, run, listener)
        if prepared is None:
            raise JobError("the run's data is gone, by which the base could be proved", where="--base")
        folder, dtype = models.materialise(job.model, job.folder), decision(run, "model.dtype")
        write_base(job, folder, run.base, dtype=dtype, prepared=prepared)
    return run.base


def _prepared(job: Job, run: Run, listener: Listener) -> Path | None:
    """The data that the run was trained on; None where it is gone, which must not keep a model from its owner."""
    try:
        return plan_of(job, run).prepared.folder
    except DataError as error:
        listener.note(f"  no parity certificate, without which `distft serve` refuses the export: {error}")
        return None


def _checkpoint(job: Job, run: Run, step: int | None = None) -> Checkpoint:
    """The best checkpoint, or that of a step.

    Raises:
        CheckpointError: There is none.
    """
    storage = storage_of(job, run)
    key = signing_key(run, storage)
    found = best(storage, key) if step is None else None
    found = next((one for one in complete(storage, key) if one.step == step), found)
    if found is None:
        _, problems = newest_sound(storage, key)
        what = "; ".join(["there is no complete checkpoint to export", *problems])
        raise CheckpointError(what, where=str(storage), fix="train the run first")
    return found


def evaluate_all(job: Job, run: Run, data: Data, nodes: list[Node], listener: Listener) -> None:
    """Base beside best on the sealed test split, and best on validation.

    Answers are written for the first of them only, since that takes long; ``distft evaluate --split validation``
    writes them for validation too.
    """
    splits = [split for split in ("test", "validation") if len(Prepared.open(data.prepared).rows(split))]
    for split in splits:
        listener.stage(f"evaluate on {split}")
        compared = ["base", "best"] if job.evaluate.compare_base and split == "test" else ["best"]
        names = [name for name in metrics_of(job) if split == splits[0] or not METRICS[name].answers]
        if names:
            _score(job, run, data, nodes, compared, split, names, listener)


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
    with connected(job.cluster.address) as nodes:
        data = prepare(job, listener)
        listener.stage(f"evaluate on {split}")
        compared = ["base", model] if job.evaluate.compare_base and model != "base" else [model]
        return _score(job, run, data, nodes, compared, split, metrics_of(job), listener)


def _score(
    job: Job,
    run: Run,
    data: Data,
    nodes: list[Node],
    compared: list[str],
    split: str,
    names: Sequence[str],
    listener: Listener,
) -> dict[str, Any]:
    """Scores ``compared`` on the cluster's workers and brings ``evaluation.json`` up to date."""
    prepared = Prepared.open(data.prepared)
    rows = prepared.rows(split)
    if not len(rows):
        raise JobError(f"the job has no {split} split", where=f"data.splits.{split}", fix="give it a share above 0")
    if split == "test":
        looks = [{"time": time.time(), "model": model} for model in compared]
        update_result(run, test_looks=read_json(run.result)["test_looks"] + looks)
    indices = sampled_rows(len(rows), job.evaluate.samples, job.seed)
    results: dict[str, list[Scored]] = {}
    if job.task.kind == "classification" and "base" in compared:
        results["base"] = evaluation.guesses(rows, indices, prepared.labels, prepared.card["labels"]["rows"]["train"])
    models = [model for model in compared if model not in results]
    work = evaluation.units(
        rows,
        indices,
        samples=job.evaluate.samples,
        seed=job.seed,
        max_new_tokens=job.evaluate.max_new_tokens if any(METRICS[name].answers for name in names) else None,
    )
    if models:
        need = worker_resources(job, nodes)
        with tempfile.TemporaryDirectory(dir=run.folder) as temporary:  # where every node sees it
            subjects = [
                _subject(job, run, data, _model_folder(run, data, model, Path(temporary)), split, names)
                for model in models
            ]
            found = score_on_cluster(subjects, work, job, need, listener.progress)
            results |= zip(models, found, strict=True)
    written = {model: [one for part in parts for one in part.written] for model, parts in results.items()}
    if any(written.values()):
        _tell(run, written, split, job.evaluate.max_new_tokens, listener)
    scored = {model: evaluation.merge(one for part in parts for one in part.scores) for model, parts in results.items()}
    report = _report(job, run, scored, split, names, prepared.labels)
    write_examples(job, run, data.model, prepared, Results(split, indices, scored, written))
    if split == "test" and "best" in compared:
        write_card(job, _checkpoint(job, run), run.export, dtype=decision(run, "model.dtype"), scores=report)
    return report


def _subject(job: Job, run: Run, data: Data, folder: Path, split: str, names: Sequence[str]) -> Subject:
    return Subject(
        model=folder,
        prepared=data.prepared,
        split=split,
        kind=job.task.kind,
        dtype=decision(run, "model.dtype"),
        metrics=tuple(names),
        max_new_tokens=job.evaluate.max_new_tokens,
        trust_remote_code=job.model.trust_remote_code,
    )


def _report(
    job: Job,
    run: Run,
    scored: dict[str, list[DocumentScore]],
    split: str,
    names: Sequence[str],
    labels: Sequence[str],
) -> dict[str, Any]:
    """Puts the scores of some models on one split into ``evaluation.json``."""
    report: dict[str, Any] = read_json(run.evaluation) if run.evaluation.exists() else {}
    for model, scores in scored.items():
        report.setdefault(model, {})[split] = _as_json(evaluation.summarise(scores, names, job.seed))
        if labels:
            classes = report.setdefault("classes", {}).setdefault(model, {})
            classes[split] = evaluation.classes(scores, labels)
    if {"base", "best"} <= scored.keys():
        change = evaluation.difference(scored["base"], scored["best"], names, job.seed)
        report.setdefault("difference", {})[split] = _as_json(change)
    write_json(run.evaluation, report)
    return report


#: Answers that are kept for a person to read.
SHOWN_ANSWERS = 20


def _tell(run: Run, written: dict[str, list[Written]], split: str, max_new_tokens: int, listener: Listener) -> None:
    """Writes ``answers.jsonl``: the first documents' prompts and references, with the answer of each model.

    Says how many answers were cut short because the model's context was full.
    """
    by_document: dict[int, dict[str, Any]] = {}
    for model, answers in written.items():
        for one in answers:
            known = by_document.setdefault(one.document, {"prompt": one.prompt, "reference": one.reference})
            known[model] = one.answer
        short = sum(not one.stopped and one.tokens < max_new_tokens for one in answers)
        if short:
            listener.note(f"  {short} of {len(answers)} answers of {model} end where the model's context is full")
    lines = [
        {"split": split, "document": number, **by_document[number]} for number in sorted(by_document)[:SHOWN_ANSWERS]
    ]
    run.answers.unlink(missing_ok=True)
    for line in lines:
        append_line(run.answers, line)


def _as_json(estimates: dict[str, Estimate]) -> dict[str, Any]:
    """Without the p-value where there is none."""
    return {
        name: {key: value for key, value in dataclasses.asdict(estimate).items() if value is not None}
        for name, estimate in estimates.items()
    }


def _model_folder(run: Run, data: Data, model: str, temporary: Path) -> Path:
    """Where the base model, the export, or the newest checkpoint (exported to ``temporary``) lies."""
    if model == "base":
        return data.model
    if model == "last":
        return export(run, to=temporary / "last", step=read_json(run.result)["step"])
    if not (run.export / "config.json").exists():
        return export(run)
    return run.export

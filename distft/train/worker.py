"""What every rank does: the same under Ray Train, under torchrun and in a bare process."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np

from distft import engine as engines
from distft.checkpoint import State, check_budget, checkpoints_folder, save
from distft.config import Job
from distft.data.order import Order, sampled_rows
from distft.data.store import Prepared, Rows
from distft.engine import Engine
from distft.model import (
    DTYPES,
    LossModel,
    class_weights,
    flops_per_token,
    load_tokenizer,
    pad_id,
    training_model,
)
from distft.plan.choices import Choices, choose
from distft.plan.hardware import Hardware, peak_flops
from distft.runs import Run, event, read_json, read_lines, write_json
from distft.train.loop import Indices, Progress, Training, fit
from distft.train.outcome import Outcome
from distft.train.reporter import FileReporter, Reporter
from distft.train.resume import curve_settings, restore
from distft.train.schedule import learning_rate
from distft.world import World

#: Rows that the mean attended length is taken over, and documents that an error names.
SAMPLED_ROWS, NAMED_DOCUMENTS = 256, 12


def work(
    job: Job,
    world: World,
    run: Run,
    prepared_folder: Path,
    model_folder: Path,
    reporter: Reporter | None = None,
    *,
    resume: bool = False,
    kind: Literal["zero", "plain"] = "zero",
) -> Outcome:
    """Trains as one rank of ``world``; all ranks call it with the same arguments.

    Args:
        job: What to train.
        world: This rank's place.
        run: Where the run's files are.
        prepared_folder: The prepared data.
        model_folder: The base model.
        reporter: Who hears of it; by default the run's files are written.
        resume: Go on from the newest sound checkpoint, where there is one.
        kind: ``plain`` is the one-process reference engine.

    Returns:
        How it ended.

    Raises:
        DistftError: On every rank.
    """
    choices = choose(job, world.size, hardware := Hardware.detect())
    if world.is_main:
        _record(run, choices)
    prepared = Prepared.open(prepared_folder)
    dtype = DTYPES[choices.dtype.value]
    pad = pad_id(load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code))
    model = training_model(job, model_folder, dtype, prepared.labels, pad)
    flops = flops_per_token(model, attended_tokens(prepared.rows("train")))
    loss_model = LossModel(
        model,
        activation_checkpointing=choices.activation_checkpointing.value,
        class_weights=class_weights(job, prepared.labels, prepared.card),
    )
    engine = engines.open(loss_model, _settings(job, choices), world, kind)
    del model, loss_model  # stage 3 splits the weights: nothing else may hold them whole
    with FileReporter(run, is_main=world.is_main, tensorboard=job.track.tensorboard) as files:
        training = _training(
            job,
            run,
            engine,
            choices,
            prepared,
            pad=pad,
            flops=flops,
            peak=peak_flops(hardware, dtype).flops,
            reporter=reporter or files,
        )
        progress = _start(job, run, training, choices, prepared, resume=resume)
        progress, interrupted = fit(training, progress)
    engine.close()
    metrics = {} if progress.best_loss is None else {"validation_loss": progress.best_loss}
    return Outcome(progress.step, progress.best_step, interrupted, metrics)


def _settings(job: Job, choices: Choices) -> engines.Settings:
    return engines.Settings(
        dtype=DTYPES[choices.dtype.value],
        stage=choices.stage.value,
        offload=job.zero.offload,
        weight_decay=job.train.weight_decay,
        max_grad_norm=job.train.max_grad_norm,
    )


def _training(
    job: Job,
    run: Run,
    engine: Engine,
    choices: Choices,
    prepared: Prepared,
    *,
    pad: int,
    flops: float,
    peak: float,
    reporter: Reporter,
) -> Training:
    """Puts together what the loop needs."""
    rows, validation = prepared.rows("train"), prepared.rows("validation")
    train = job.train
    total_rows = train.steps * train.batch_size if train.steps else math.ceil((train.epochs or 1) * len(rows))
    order = Order(len(rows), job.seed, train.batch_size, total_rows)
    root, state = checkpoints_folder(job, run), _state(job, engine.world, choices, prepared)

    def write(progress: Progress) -> None:
        checkpoint = save(engine, root, replace(state, **asdict(progress)), job.checkpoint.budget_bytes)
        reporter.event(event("checkpoint", progress.step, f"{checkpoint.bytes:,} bytes in {checkpoint.folder.name}"))

    return Training(
        engine=engine,
        plan=choices.batch,
        order=order,
        rows=rows,
        validation=validation,
        validation_rows=sampled_rows(len(validation), job.evaluate.samples, job.seed),
        pad_id=pad,
        seed=job.seed,
        learning_rate=lambda step: learning_rate(
            step, order.steps, train.learning_rate, train.schedule.kind, train.schedule.warmup
        ),
        validate_every=train.validate_every.steps(order.steps),
        checkpoint_every=job.checkpoint.every.steps(order.steps),
        patience=train.patience,
        classifies=job.task.kind == "classification",
        flops_per_token=flops,
        peak_flops=peak,
        reporter=reporter,
        save=write,
        stop_requested=run.stop_request.exists,
        names=lambda indices: named(prepared, rows, indices),
    )


def _state(job: Job, world: World, choices: Choices, prepared: Prepared) -> State:
    return State(
        0,
        world.size,
        choices.stage.value,
        choices.dtype.value,
        prepared.fingerprint,
        settings=curve_settings(job),
        labels=list(prepared.labels),
    )


def _start(job: Job, run: Run, training: Training, choices: Choices, prepared: Prepared, *, resume: bool) -> Progress:
    """Where to begin; says so, after making sure that the checkpoints to come fit their budget."""
    engine = training.engine
    check_budget(job.checkpoint.budget_bytes, engine.state_bytes(), validated=len(training.validation) > 0)
    before = engine.broadcast([line for line in read_lines(run.metrics) if line["kind"] == "event"])
    state = _state(job, engine.world, choices, prepared)
    progress, problems = restore(engine, checkpoints_folder(job, run), state, resume=resume)
    for problem in problems:
        training.reporter.event(event("damaged", progress.step, problem))
    what = f"ZeRO {choices.stage.value}, {choices.dtype.value}"
    share = f"{training.order.steps:,} steps on {engine.world.size} workers, {what}"
    if not before:
        training.reporter.event(event("start", progress.step, share))
    else:
        name = "resume" if before[-1]["event"] == "interrupted" else "restart"
        where = (
            f"from the checkpoint of step {progress.step:,}" if progress.step else "from the beginning: no checkpoint"
        )
        training.reporter.event(event(name, progress.step, f"{where}; {share}"))
    return progress


def _record(run: Run, choices: Choices) -> None:
    """Adds what was decided, each with its reason, to ``resolved.json``."""
    resolved = read_json(run.resolved) if run.resolved.exists() else {}
    decisions = {**resolved.get("decisions", {}), **choices.record()}
    write_json(run.resolved, {**resolved, "decisions": decisions})


def attended_tokens(rows: Rows) -> int:
    """The mean length of the segment that a token lies in, over the first rows: what its attention costs by."""
    lengths = np.array([length for index in range(min(len(rows), SAMPLED_ROWS)) for length in rows[index].segments])
    return round(float((lengths**2).sum() / lengths.sum()))


def named(prepared: Prepared, rows: Rows, indices: Indices) -> str:
    """Where the documents of some rows come from, for people: ``file.jsonl:12``."""
    numbers = {document for index in indices for document in rows[index].documents}
    documents = [document for document in prepared.documents("train") if document.index in numbers]
    names = [f"{document.source}:{document.row}" for document in documents[:NAMED_DOCUMENTS]]
    more = len(documents) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")

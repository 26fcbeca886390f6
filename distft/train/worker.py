"""What every rank does: the same under Ray Train, under torchrun and in a bare process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import transformers

from distft import engine as engines
from distft.checkpoint import Saver, State, check_budget, shared_key, storage_of
from distft.config import Job
from distft.data.order import Order, sampled_rows
from distft.data.store import Prepared, Rows
from distft.engine import Engine
from distft.errors import DistftError
from distft.log import Warned
from distft.model import (
    DTYPES,
    LossModel,
    class_weights,
    flops_per_token,
    load_tokenizer,
    pad_id,
    training_model,
)
from distft.model.shape import Shape, of_folder
from distft.plan.choices import Choices, choose
from distft.plan.hardware import Hardware, peak_flops
from distft.plan.speed import Links
from distft.runs import ASIDES, Run, event, read_json, read_lines, write_json
from distft.train.environment import versions
from distft.train.forecast import Forecast, forecast, settle
from distft.train.loop import Indices, Training, batch_of, fit
from distft.train.orders import Listening, asked
from distft.train.outcome import FIRST, Attempt, Outcome
from distft.train.progress import Progress
from distft.train.reporter import FileReporter, Record, Reporter
from distft.train.resume import curve_settings, probe_loss, restore
from distft.train.saving import Saving
from distft.train.schedule import learning_rate
from distft.train.trackers import followers
from distft.train.watchdog import Watchdog
from distft.world import World

#: Documents that an error names.
NAMED_DOCUMENTS = 12

#: Tokens whose loss a checkpoint is known by: they pass through every layer, and training waits for them at each save.
PROBE_TOKENS = 8


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
    attempt: Attempt = FIRST,
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
        attempt: What is peculiar to this start of the workers.

    Returns:
        How it ended.

    Raises:
        DistftError: On every rank.
    """
    transformers.logging.set_verbosity_warning()  # the driver's environment, which this process may have, says error
    with Warned() as warned:
        hardware = Hardware.detect()
        process_bytes = psutil.Process().memory_info().rss
        shape = of_folder(model_folder)
        prepared = Prepared.open(prepared_folder)
        choices = _agreed(lambda: _choices(job, world, hardware, shape, prepared, attempt), world)
        if world.is_main:
            _record(run, choices)
        pad = pad_id(load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code))
        engine, flops = _open(job, world, choices, prepared, model_folder, pad, kind)
        peak = peak_flops(hardware, DTYPES[choices.dtype.value]).flops
        expected = _forecast(job, run, shape, choices, world, hardware, peak, prepared, process_bytes)
        with (
            FileReporter(
                run, is_main=world.is_main, trackers=followers(job, run) if world.is_main else (), warned=warned
            ) as files,
            Watchdog(run.logs / f"rank-{world.rank}.stack", attempt.stall_seconds) as watchdog,
        ):
            training, take_up = _training(
                job,
                run,
                engine,
                choices,
                prepared,
                pad=pad,
                flops=flops,
                peak=peak,
                reporter=reporter or files,
                watchdog=watchdog,
                attempt=attempt,
            )
            progress = _start(job, run, training, take_up, choices, attempt, resume=resume)
            progress, stopped = fit(training, progress)
        engine.close()
        if world.is_main:
            settle(run, expected)
        metrics = {} if progress.best_loss is None else {"validation_loss": progress.best_loss}
        return Outcome(progress.step, progress.best_step, stopped, metrics)


def _choices(job: Job, world: World, hardware: Hardware, shape: Shape, prepared: Prepared, attempt: Attempt) -> Choices:
    """What the job leaves to ``auto``, decided for this start of the workers."""
    return choose(
        job,
        world.size,
        hardware,
        most_workers=attempt.most_workers,
        micro_batch_limit=attempt.micro_batch_limit,
        shape=shape,
        workers_per_node=world.local_size,
        run_tokens=run_tokens(job, prepared.rows("train")),
        compiler=engines.has_compiler(),
    )


def _agreed(decide: Callable[[], Choices], world: World) -> Choices:
    """Rank 0's decision on every rank: facts of nodes, such as their memory, may differ a little.

    Raises:
        DistftError: On every rank, where rank 0 cannot decide.
    """
    if world.size == 1:
        return decide()
    outcome: Choices | DistftError | None = None
    if world.is_main:
        try:
            outcome = decide()
        except DistftError as error:
            outcome = error
    device = engines.device_of(world)
    engines.join(world, device)
    agreed: Choices | DistftError = engines.broadcast(outcome, device)
    if isinstance(agreed, DistftError):
        raise agreed
    return agreed


def _forecast(
    job: Job,
    run: Run,
    shape: Shape,
    choices: Choices,
    world: World,
    hardware: Hardware,
    peak: float,
    prepared: Prepared,
    process_bytes: int,
) -> Forecast:
    """What this run is expected to take, from what its data is like, and its network where the driver measured that."""
    measured = read_json(run.environment).get("network", ()) if run.environment.exists() else ()
    rows = prepared.rows("train")
    tokens = rows.tokens(np.arange(len(rows)))
    return forecast(
        job,
        shape,
        choices,
        world,
        hardware,
        peak,
        process_bytes=process_bytes,
        labels=len(prepared.labels),
        attended_tokens=rows.attended_tokens(),
        fill=min(1.0, tokens / (len(rows) * job.data.max_tokens)),
        links=Links.of(measured),
    )


def _open(
    job: Job,
    world: World,
    choices: Choices,
    prepared: Prepared,
    model_folder: Path,
    pad: int,
    kind: Literal["zero", "plain"],
) -> tuple[Engine, float]:
    """The engine around the job's model, which it alone holds (stage 3 splits the weights), and its FLOPs per token."""
    model = training_model(job, model_folder, DTYPES[choices.dtype.value], prepared.labels, pad)
    flops = flops_per_token(model, prepared.rows("train").attended_tokens())
    loss_model = LossModel(
        model,
        activation_checkpointing=choices.activation_checkpointing.value,
        class_weights=class_weights(job, prepared.labels, prepared.card),
        compiled=choices.compile.value,
    )
    return engines.open(loss_model, _settings(job, choices), world, kind), flops


def _settings(job: Job, choices: Choices) -> engines.Settings:
    return engines.Settings(
        dtype=DTYPES[choices.dtype.value],
        stage=choices.stage.value,
        offload=choices.offload.value,
        hpz_partition_size=choices.hpz.value if choices.stage.value == 3 else 1,
        sequence_parallel_size=choices.sequence_parallel.value,
        weight_decay=job.train.weight_decay,
        max_grad_norm=job.train.max_grad_norm,
    )


#: Loads the newest sound checkpoint, if resuming is asked for: how far the run is, and what was passed over.
TakeUp = Callable[[bool], tuple[Progress | None, list[str]]]


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
    watchdog: Watchdog,
    attempt: Attempt,
) -> tuple[Training, TakeUp]:
    """Puts together what the loop needs."""
    rows, validation = prepared.rows("train"), prepared.rows("validation")
    train = job.train
    order = Order.of(job, len(rows))
    storage, state = storage_of(job, run), _state(job, engine.world, choices, prepared)
    key = shared_key(engine, run, storage)
    few = batch_of(rows, np.zeros(1, np.int64), pad).around_first_target(PROBE_TOKENS)

    def probe() -> float | None:
        return probe_loss(engine, few)

    exploits = engine.broadcast([line for line in read_lines(run.metrics) if line.get("event") == "exploit"])

    def take_up(resume: bool) -> tuple[Progress | None, list[str]]:
        return restore(engine, storage, key, state, probe, resume=resume, exploits=exploits)

    saving = Saving(Saver(engine, storage, key, job.checkpoint.budget_bytes), state, probe, reporter)
    training = Training(
        engine=engine,
        plan=choices.batch,
        order=order,
        rows=rows,
        validation=validation,
        validation_rows=sampled_rows(len(validation), job.evaluate.samples, job.seed),
        pad_id=pad,
        width=job.data.max_tokens if choices.compile.value else None,
        seed=job.seed,
        learning_rate=lambda step: learning_rate(
            step, order.steps, train.learning_rate, train.schedule.kind, train.schedule.warmup
        ),
        validates=_validates(job, order, rows, attempt.rungs),
        until=order.steps if attempt.until is None else _reaching(order, rows, [attempt.until])[0],
        checkpoint_every=job.checkpoint.every.steps(order.steps),
        patience=train.patience,
        non_finite=train.non_finite,
        classifies=job.task.kind == "classification",
        flops_per_token=flops,
        peak_flops=peak,
        reporter=reporter,
        saving=saving,
        rewind=lambda: take_up(True)[0] or Progress(),
        orders=Listening(lambda: asked(run, attempt.began), lambda: saving.seconds),
        watchdog=watchdog,
        names=lambda indices: named(prepared, rows, indices),
    )
    return training, take_up


def _validates(job: Job, order: Order, rows: Rows, rungs: Sequence[int] | None) -> Callable[[int], bool]:
    """After which steps the job validates: every so many, or those that first reach a rung's tokens."""
    if rungs is None:
        every = job.train.validate_every.steps(order.steps)
        return lambda step: step % every == 0
    reached = frozenset(_reaching(order, rows, rungs))
    return lambda step: step in reached


def _reaching(order: Order, rows: Rows, rungs: Sequence[int]) -> list[int]:
    """The first step at which so many tokens are trained on, of each rung; one past the last where none does."""
    tokens = np.cumsum([rows.tokens(step) for step in order.first(order.steps)])
    return [int(step) + 1 for step in np.searchsorted(tokens, rungs)]


def _state(job: Job, world: World, choices: Choices, prepared: Prepared) -> State:
    return State(
        0,
        world.size,
        choices.stage.value,
        choices.dtype.value,
        prepared.fingerprint,
        micro_batch_size=choices.batch.micro_batch_size,
        settings=curve_settings(job),
        labels=list(prepared.labels),
        versions=versions(),
    )


def _start(
    job: Job, run: Run, training: Training, take_up: TakeUp, choices: Choices, attempt: Attempt, *, resume: bool
) -> Progress:
    """Where to begin; says so, after making sure that checkpoints can be written."""
    engine, saving = training.engine, training.saving
    check_budget(job.checkpoint.budget_bytes, engine.state_bytes(), validated=len(training.validation) > 0)
    told = [line for line in read_lines(run.metrics) if line["kind"] == "event" and line["event"] not in ASIDES]
    before = engine.broadcast(told)
    taken_up, problems = take_up(resume)
    progress = taken_up or Progress()
    for problem in problems:
        training.reporter.event(event("damaged", progress.step, problem))
    what = f"ZeRO {choices.stage.value}, {choices.dtype.value}"
    share = f"{training.order.steps:,} steps on {_workers(engine.world.size)}, {what}"
    name, where = _beginning(before, progress, engine.world.size)
    seconds = {} if attempt.began is None else {"seconds": time.time() - attempt.began}
    training.reporter.event({**event(name, progress.step, f"{where}{share}"), **seconds, "workers": engine.world.size})
    if taken_up is None:
        saving.save(progress)  # a disk too small, or a storage that nodes do not share, is found before any step
    return progress


def _beginning(before: Sequence[Record], progress: Progress, workers: int) -> tuple[str, str]:
    """The name of the event that a group of workers begins with, and where it goes on from."""
    known = [line for line in before if "workers" in line]
    if not before:
        return "start", ""
    where = f"from the checkpoint of step {progress.step:,}; " if progress.step else "from the beginning; "
    if known and known[-1]["workers"] != workers:
        return "resize", f"{_workers(known[-1]['workers'])} before; {where}"
    return ("resume" if before[-1]["event"] in ("interrupted", "exploit") else "restart"), where


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _record(run: Run, choices: Choices) -> None:
    """Adds what was decided, each with its reason, to ``resolved.json``."""
    resolved = read_json(run.resolved) if run.resolved.exists() else {}
    decisions = {**resolved.get("decisions", {}), **choices.record()}
    write_json(run.resolved, {**resolved, "decisions": decisions})


def run_tokens(job: Job, rows: Rows) -> int:
    """About how many tokens the whole run trains on."""
    return round(Order.of(job, len(rows)).total_rows * rows.tokens(np.arange(len(rows))) / len(rows))


def named(prepared: Prepared, rows: Rows, indices: Indices) -> str:
    """Where the documents of some rows come from, for people: ``file.jsonl:12``."""
    numbers = {document for index in indices for document in rows[index].documents}
    documents = [document for document in prepared.documents("train") if document.index in numbers]
    names = [f"{document.source}:{document.row}" for document in documents[:NAMED_DOCUMENTS]]
    more = len(documents) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")

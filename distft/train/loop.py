"""The training loop: which step comes when, what is recorded, when to validate, save and stop.

Steps count from 1: step N is the N-th update, and what is recorded of it was measured before it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from distft.data.order import Order, sample_digest
from distft.data.store import Rows
from distft.engine import Engine
from distft.errors import NonFiniteLoss
from distft.model import Batch
from distft.plan.batch import BatchPlan
from distft.runs import event
from distft.train.reporter import Record, Reporter

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """Everything about a run that does not change while it runs.

    Attributes:
        engine: The model and its optimizer.
        plan: How a global batch is divided.
        order: Which rows make up which step.
        rows: The training rows.
        validation: The validation split, maybe empty.
        validation_rows: Which of its rows are scored: all, or as many as ``evaluate.samples`` allows.
        pad_id: The token that fills short rows of a micro-batch.
        seed: The job's.
        learning_rate: The rate of a step.
        validate_every: Steps from one validation to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        patience: Validations without gain after which to stop; None goes on.
        classifies: Whether each text has a label to be right about.
        flops_per_token: Forward and backward.
        peak_flops: What one worker can reach in a second.
        reporter: Who hears of it.
        save: Writes a checkpoint.
        stop_requested: Whether somebody asks to stop; asked on rank 0.
        names: Names rows for people: where their documents come from.
    """

    engine: Engine
    plan: BatchPlan
    order: Order
    rows: Rows
    validation: Rows
    validation_rows: Indices
    pad_id: int
    seed: int
    learning_rate: Callable[[int], float]
    validate_every: int
    checkpoint_every: int
    patience: int | None
    classifies: bool
    flops_per_token: float
    peak_flops: float
    reporter: Reporter
    save: Callable[[Progress], None]
    stop_requested: Callable[[], bool]
    names: Callable[[Indices], str]


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Updates made.
        best_step: The validated step with the lowest loss, or None.
        best_loss: Its validation loss.
        validations_without_gain: Validations since.
    """

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    validations_without_gain: int = 0

    def validated(self, loss: float) -> Progress:
        """After a validation at this step."""
        if self.best_loss is None or loss < self.best_loss:
            return replace(self, best_step=self.step, best_loss=loss, validations_without_gain=0)
        return replace(self, validations_without_gain=self.validations_without_gain + 1)


def fit(training: Training, progress: Progress) -> tuple[Progress, bool]:
    """Trains from ``progress`` to the end of the order, until patience runs out, or until it is asked to stop.

    Returns:
        How far it came, and whether it was asked to stop.

    Raises:
        NonFiniteLoss: On every rank; the checkpoints hold nothing of it.
        DistftError: A checkpoint cannot be written.
    """
    total, reporter = training.order.steps, training.reporter
    stop = False
    while progress.step < total and not stop and not _out_of_patience(training, progress):
        record, stop = step(training, progress.step + 1)
        reporter.train(record)
        progress = replace(progress, step=record["step"])
        last = progress.step == total
        if len(training.validation) and (last or progress.step % training.validate_every == 0):
            progress = progress.validated(validate(training, progress.step))
        improved = progress.best_step == progress.step
        if improved:
            reporter.event(event("best", progress.step, f"validation loss {progress.best_loss:.6f}"))
        ending = last or stop or _out_of_patience(training, progress)
        if improved or ending or progress.step % training.checkpoint_every == 0:
            training.save(progress)
    stop = stop and progress.step < total
    if stop:
        reporter.event(event("interrupted", progress.step, "asked to stop"))
    elif progress.step < total:
        reason = f"no gain in {progress.validations_without_gain} validations; the best was step {progress.best_step}"
        reporter.event(event("finished", progress.step, reason))
    else:
        reporter.event(event("finished", progress.step, f"all {total:,} steps"))
    return progress, stop


def _out_of_patience(training: Training, progress: Progress) -> bool:
    return training.patience is not None and progress.validations_without_gain >= training.patience


def step(training: Training, number: int) -> tuple[Record, bool]:
    """Makes one update.

    Args:
        training: The run.
        number: The step, from 1.

    Returns:
        Its record, equal on all ranks but for times, and whether somebody asks to stop.

    Raises:
        NonFiniteLoss: The loss or the gradient norm is not a number, on every rank.
    """
    start = time.perf_counter()
    engine, rows = training.engine, training.rows
    indices = training.order.step(number - 1)
    micro_batches = training.plan.micro_batches(indices, engine.world.rank)
    supervised = rows.supervised_tokens(indices)
    losses = _losses(training, number, micro_batches, 1.0 / max(1, supervised))
    # One exchange of a few numbers: the loss, whether rank 0 was asked to stop, and each rank's memory in its place.
    memory = [0.0] * engine.world.size
    memory[engine.world.rank] = float(engine.peak_memory_bytes())
    asked = float(engine.world.is_main and training.stop_requested())
    total, stop, *memory = engine.sum_over_ranks([sum(losses), asked, *memory])
    if not math.isfinite(total):
        mine = [part for part, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
        bad = [part for parts in engine.gather(mine) for part in parts]
        _refuse(training, number, f"the loss is {total}", np.concatenate(bad))
    rate = training.learning_rate(number)
    norm = engine.step(rate)
    if not math.isfinite(norm):
        _refuse(training, number, f"the gradient norm is {norm}", indices)
    seconds, tokens = time.perf_counter() - start, rows.tokens(indices)
    record = {
        "kind": "train",
        "time": time.time(),
        "step": number,
        "steps": training.order.steps,
        "epoch": min(number * training.order.batch_size, training.order.total_rows) / len(rows),
        "loss": total / max(1, supervised),
        "learning_rate": rate,
        "grad_norm": norm,
        "rows": len(indices),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": training.flops_per_token * tokens / seconds / (engine.world.size * training.peak_flops),
        "peak_memory_bytes": int(max(memory)),
        "world_size": engine.world.size,
        "micro_batch_size": training.plan.micro_batch_size,
        "accumulation": len(micro_batches),
        "sample_digest": sample_digest(rows.ids[indices].tolist()),
    }
    return record, stop > 0


def _losses(training: Training, number: int, micro_batches: list[Indices], scale: float) -> list[float]:
    """Runs this rank's passes of a step; the loss sum of each."""
    engine, last = training.engine, len(micro_batches) - 1
    losses = []
    for turn, indices in enumerate(micro_batches):
        batch = batch_of(training.rows, indices, training.pad_id)
        seed = micro_batch_seed(training.seed, number, turn * engine.world.size + engine.world.rank)
        losses.append(engine.forward_backward(batch, scale, last=turn == last, seed=seed))
    return losses


def validate(training: Training, number: int) -> float:
    """Scores the validation rows on all ranks; the loss per supervised token is returned.

    Reported beside it is accuracy for a classifier, perplexity for a language model. With class weights the loss is
    weighted as in training.
    """
    engine, rows = training.engine, training.validation
    size = training.plan.micro_batch_size
    scored = training.validation_rows
    mine = scored[engine.world.rank :: engine.world.size]
    passes = math.ceil(math.ceil(len(scored) / engine.world.size) / size)
    start = time.perf_counter()
    sums = [0.0, 0.0]
    for turn in range(passes):
        batch = batch_of(rows, mine[turn * size : (turn + 1) * size], training.pad_id)
        losses, hits = engine.scores(batch)
        sums = [sums[0] + float(losses.double().sum()), sums[1] + int(hits.sum())]
    supervised = rows.supervised_tokens(scored)
    loss, accuracy = (total / max(1, supervised) for total in engine.sum_over_ranks(sums))
    quick = {"accuracy": accuracy} if training.classifies else {"perplexity": math.exp(min(loss, 700.0))}
    record: dict[str, Any] = {
        "kind": "validation",
        "time": time.time(),
        "step": number,
        "loss": loss,
        **quick,
        "supervised_tokens": supervised,
        "seconds": time.perf_counter() - start,
    }
    training.reporter.validation(record)
    return loss


def batch_of(rows: Rows, indices: Indices, pad_id: int) -> Batch:
    """The rows as a micro-batch; an empty one where there are none."""
    if len(indices) == 0:
        return Batch.empty(pad_id)
    return Batch.collate([rows[index] for index in indices], pad_id)


def micro_batch_seed(seed: int, number: int, micro_batch: int) -> int:
    """What dropout is drawn from: a function of the job's seed, the step and the global micro-batch."""
    digest = hashlib.blake2b(f"distft dropout {seed} {number} {micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _refuse(training: Training, number: int, problem: str, indices: Indices) -> None:
    """Ends the run on every rank; the weights that this step would have made are in no checkpoint."""
    names = training.names(indices)
    training.reporter.event(event("failed", number, f"{problem}, in rows of {names}"))
    raise NonFiniteLoss(
        f"{problem}; the rows are of {names}",
        where=f"step {number}",
        fix="lower train.learning_rate, or look at these rows; the checkpoints before this step are good",
    )

"""The training loop: which step comes when, what is recorded, when to validate, save and stop.

Steps count from 1: step N is the N-th update, and what is recorded of it was measured before it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.data.order import Order, sample_digest
from distft.data.store import Rows
from distft.engine import Engine
from distft.engine.memory import give_back_free_memory
from distft.errors import NonFiniteLoss
from distft.model import Batch
from distft.plan.batch import BatchPlan
from distft.runs import Stop, event
from distft.train.orders import NO_ORDERS, Orders
from distft.train.progress import Progress
from distft.train.reporter import Record, Reporter
from distft.train.saving import Saving
from distft.train.watchdog import Watchdog

Indices = npt.NDArray[np.int64]

#: Steps without a finite loss or gradient norm that a run may leave out before it is given up.
SKIPPED_STEPS = 10


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
        width: Tokens that each row of a micro-batch is filled to; None: as many as the longest one has.
        seed: The job's.
        learning_rate: The rate of a step.
        validates: Whether to validate after a step; after the last one it is done in any case.
        until: The step after which a trial's turn ends; the last step of all, or a later one, where none does.
        checkpoint_every: Steps from one checkpoint to the next.
        patience: Validations without gain after which to stop; None goes on.
        non_finite: What becomes of a step whose loss or gradient norm is not a number.
        classifies: Whether each text has a label to be right about.
        flops_per_token: Forward and backward.
        peak_flops: What one worker can reach in a second.
        reporter: Who hears of it.
        saving: Writes checkpoints beside training.
        rewind: Takes up the newest sound checkpoint again.
        orders: What somebody asks training to do now; asked on rank 0.
        watchdog: Is shown signs of life.
        names: Names rows for people: where their documents come from.
    """

    engine: Engine
    plan: BatchPlan
    order: Order
    rows: Rows
    validation: Rows
    validation_rows: Indices
    pad_id: int
    width: int | None
    seed: int
    learning_rate: Callable[[int], float]
    validates: Callable[[int], bool]
    until: int
    checkpoint_every: int
    patience: int | None
    non_finite: Literal["stop", "skip_batch", "rewind"]
    classifies: bool
    flops_per_token: float
    peak_flops: float
    reporter: Reporter
    saving: Saving
    rewind: Callable[[], Progress]
    orders: Callable[[], Orders]
    watchdog: Watchdog
    names: Callable[[Indices], str]


def fit(training: Training, progress: Progress) -> tuple[Progress, Stop | None]:
    """Trains from ``progress`` to the end of the order, until patience runs out, or until it is asked to stop.

    Returns:
        How far it came, and why it was asked to stop before the end.

    Raises:
        NonFiniteLoss: On every rank; the checkpoints hold nothing of it.
        DistftError: The last checkpoint cannot be written.
    """
    total, reporter, saving = training.order.steps, training.reporter, training.saving
    first = progress.step + 1
    orders = _within_turn(training, progress, NO_ORDERS)
    while progress.step < total and orders.stop is None and not _out_of_patience(training, progress):
        try:
            record, orders = step(training, progress.step + 1, skip=progress.step + 1 in progress.skipped_steps)
        except NonFiniteLoss as problem:
            progress = _past(training, progress, problem)
            continue
        reporter.train(record)
        progress = replace(progress, step=record["step"])
        if progress.step == first:
            give_back_free_memory()
        last = progress.step == total
        if len(training.validation) and (last or training.validates(progress.step)):
            progress = progress.validated(validate(training, progress.step))
        improved = progress.best_step == progress.step
        if improved:
            reporter.event(event("best", progress.step, f"validation loss {progress.best_loss:.6f}"))
        due = improved or progress.step % training.checkpoint_every == 0
        if orders.stop == "resize" and not due:
            orders = replace(orders, stop=None)  # it comes again, and is taken at a checkpoint
        orders = _within_turn(training, progress, orders)
        if last or orders.stop is not None or _out_of_patience(training, progress):
            saving.save(progress)
        elif due or orders.save:
            saving.begin(progress)
    stop = orders.stop if progress.step < total else None
    reporter.event(_ending(progress, stop, total))
    return progress, stop


def _within_turn(training: Training, progress: Progress, orders: Orders) -> Orders:
    """The orders; where nobody gives any, to stop when the turn has ended."""
    ended = progress.step >= training.until and orders.stop is None
    return replace(orders, stop="turn") if ended else orders


def _ending(progress: Progress, stop: Stop | None, total: int) -> Record:
    if stop is not None:
        reasons = {
            "interrupt": "asked to stop",
            "preempted": "its node is about to go",
            "resize": "more workers can be had",
            "turn": "other trials have their turn",
        }
        return event("preempted" if stop == "preempted" else "interrupted", progress.step, reasons[stop])
    if progress.step < total:
        reason = f"no gain in {progress.validations_without_gain} validations; the best was step {progress.best_step}"
        return event("finished", progress.step, reason)
    return event("finished", progress.step, f"all {total:,} steps")


def _out_of_patience(training: Training, progress: Progress) -> bool:
    return training.patience is not None and progress.validations_without_gain >= training.patience


def _past(training: Training, progress: Progress, problem: NonFiniteLoss) -> Progress:
    """Goes on past a step that is not a number, where the job wants that.

    The newest checkpoint is taken up again, since that step may have spoiled the weights. ``skip_batch`` leaves out
    that step alone, and those before it are done again to the same digits; ``rewind`` leaves out all from the
    checkpoint to that step (Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311, section 5.1).

    Raises:
        NonFiniteLoss: The job wants none of it, or too many steps were left out already.
    """
    bad = progress.step + 1
    training.saving.settle()  # what was saved before it is good
    if training.non_finite == "stop" or len(progress.skipped_steps) >= SKIPPED_STEPS:
        raise problem
    training.engine.step(0.0)  # its gradients must not meet those of the next
    restored = training.rewind()
    first = bad if training.non_finite == "skip_batch" else restored.step + 1
    skipped = tuple(range(first, bad + 1))
    which = f"step {bad:,} is" if len(skipped) == 1 else f"steps {first:,} to {bad:,} are"
    reason = f"{problem.what}; {which} left out, on from the checkpoint of step {restored.step:,}"
    training.reporter.event(event("skipped", bad, reason))
    known = set(progress.skipped_steps) | set(skipped)
    return replace(restored, skipped_steps=tuple(sorted(known)))


def step(training: Training, number: int, *, skip: bool = False) -> tuple[Record, Orders]:
    """Makes one update.

    Args:
        training: The run.
        number: The step, from 1.
        skip: Leave its rows out: no update.

    Returns:
        Its record, equal on all ranks but for times, and what rank 0 was asked to do.

    Raises:
        NonFiniteLoss: The loss or the gradient norm is not a number, on every rank.
    """
    training.watchdog.alive()
    engine, rows = training.engine, training.rows
    indices = training.order.step(number - 1)
    micro_batches = [] if skip else training.plan.micro_batches(indices, engine.world.rank)
    supervised = rows.supervised_tokens(indices)
    clock = _Clock()
    mine = _row_losses(training, number, indices, micro_batches, 1.0 / max(1, supervised), clock)
    losses, memory, written, orders = _exchange(training, mine)
    if not skip:  # also of a step that ends the run: they tell which rows it was
        training.reporter.row_losses((number - 1) * training.order.batch_size, losses)
    if not np.isfinite(losses).all():
        _refuse(training, number, f"the loss is {losses.sum()}", indices[~np.isfinite(losses)])
    rate = training.learning_rate(number)
    held = training.saving.hold()
    norm = None if skip else engine.step(rate)
    if norm is not None and not math.isfinite(norm):
        _refuse(training, number, f"the gradient norm is {norm}", indices)
    seconds, tokens = clock.seconds() - held, rows.tokens(indices)
    training.watchdog.step_took(seconds)
    record = {
        "kind": "train",
        "time": time.time(),
        "step": number,
        "steps": training.order.steps,
        "epoch": min(number * training.order.batch_size, training.order.total_rows) / len(rows),
        "loss": None if skip else float(losses.sum()) / max(1, supervised),
        "learning_rate": rate,
        "grad_norm": norm,
        "rows": len(indices),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "step_seconds": seconds,
        "data_seconds": clock.data_seconds,
        "tokens_per_second": 0.0 if skip else tokens / seconds,
        "mfu": 0.0 if skip else training.flops_per_token * tokens / seconds / (engine.world.size * training.peak_flops),
        "peak_memory_bytes": max(memory),
        "rank_peak_memory_bytes": memory,
        "world_size": engine.world.size,
        "micro_batch_size": training.plan.micro_batch_size,
        "accumulation": len(micro_batches),
        "sample_digest": sample_digest(rows.ids[indices].tolist()),
    }
    training.saving.look(everywhere=written)  # as the copy, not in the step's time: a save says itself what it took
    return {**record, "skipped": True} if skip else record, orders


class _Clock:
    """A step's seconds, and how many of them went into putting batches together."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.data_seconds = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.began


def _exchange(
    training: Training, mine: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], list[int], bool, Orders]:
    """The one exchange of numbers in a step.

    Args:
        training: The run.
        mine: Loss sums of the step's rows, (rows,), of this rank's tokens of them.

    Returns:
        Every row's loss sum, (rows,); the most memory that each rank held, in bytes; whether a save is
        complete, as every rank knows; and what rank 0 was asked to do.
    """
    engine, size = training.engine, training.engine.world.size
    memory = [0.0] * size
    memory[engine.world.rank] = float(engine.peak_memory_bytes())
    asked = training.orders().encoded() if engine.world.is_main else NO_ORDERS.encoded()
    written = float(training.saving.written)
    sums = engine.sum_over_ranks([*mine.tolist(), *memory, written, *asked])
    losses, rest = np.array(sums[: len(mine)]), sums[len(mine) :]
    return losses, [int(one) for one in rest[:size]], rest[size] == size, Orders.decoded(rest[size + 1 :])


def _row_losses(
    training: Training,
    number: int,
    indices: Indices,
    micro_batches: Sequence[Indices],
    scale: float,
    clock: _Clock,
) -> npt.NDArray[np.float64]:
    """Runs this rank's passes of a step; the loss sums of its rows in their places among the step's, (rows,).

    Of ranks that share rows each has those of its own tokens.
    """
    engine, plan = training.engine, training.plan
    size, group = plan.micro_batch_size, plan.group_of(engine.world.rank)
    losses = np.zeros(len(indices))
    found: list[Tensor] = []
    places: list[int] = []
    for turn, part in enumerate(micro_batches):
        began = time.perf_counter()
        batch = batch_of(training.rows, part, training.pad_id, training.width)
        clock.data_seconds += time.perf_counter() - began
        place = turn * plan.groups + group
        seed = micro_batch_seed(training.seed, number, place)
        last = turn == len(micro_batches) - 1
        found.append(engine.forward_backward(batch, scale, last=last, seed=seed))
        places.extend(range(place * size, place * size + len(part)))
    if places:  # after all passes: a GPU computes one while the next one's batch is made
        losses[places] = torch.cat(found).numpy(force=True)
    return losses


def validate(training: Training, number: int) -> float:
    """Scores the validation rows on all ranks; the loss per supervised token is returned.

    Reported beside it is accuracy for a classifier, perplexity for a language model. With class weights the loss is
    weighted as in training.
    """
    engine, rows, plan = training.engine, training.validation, training.plan
    size, group = plan.micro_batch_size, plan.group_of(engine.world.rank)
    scored = training.validation_rows
    mine = scored[group :: plan.groups]
    passes = math.ceil(math.ceil(len(scored) / plan.groups) / size)
    counts = engine.world.rank % plan.sequence_parallel_size == 0  # all of a group know the same
    start = time.perf_counter()
    sums = [0.0, 0.0]
    for turn in range(passes):
        training.watchdog.alive()
        batch = batch_of(rows, mine[turn * size : (turn + 1) * size], training.pad_id)
        losses, hits = engine.scores(batch)
        if counts:
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


def batch_of(rows: Rows, indices: Indices, pad_id: int, width: int | None = None) -> Batch:
    """The rows as a micro-batch; an empty one where there are none."""
    if len(indices) == 0:
        return Batch.empty(pad_id)
    return Batch.collate([rows[index] for index in indices], pad_id, width)


def micro_batch_seed(seed: int, number: int, micro_batch: int) -> int:
    """What dropout is drawn from: a function of the job's seed, the step and the global micro-batch."""
    digest = hashlib.blake2b(f"distft dropout {seed} {number} {micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _refuse(training: Training, number: int, problem: str, indices: Indices) -> None:
    """Gives the step up on every rank; the weights that it would have made are in no checkpoint."""
    names = training.names(indices)
    if training.non_finite == "stop":
        training.reporter.event(event("failed", number, f"{problem}, in rows of {names}"))
    raise NonFiniteLoss(
        f"{problem}; the rows are of {names}",
        where=f"step {number}",
        fix="lower train.learning_rate, look at these rows, or leave such steps out (train.non_finite: skip_batch); "
        "the checkpoints before this step are good",
    )

"""A job made small, to be trained many times in a few seconds each: in other ways, and by the plain reference."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import DistftError
from distft.runs import Run

#: Steps and rows of a step: a number that neither 2 nor 3 divides, so that ranks and micro-batches get uneven shares.
STEPS, BATCH_SIZE = 20, 7
#: (rows of the source, tokens of a row) that are tried, from small to the job's own: few and short ones may hold
#: one label only, or prompts that leave no room for an answer.
SIZES: tuple[tuple[int | None, int | None], ...] = ((300, 64), (3000, 512), (None, None))
#: Where a run is killed, and from which checkpoint it goes on.
KILLED_AFTER, CHECKPOINT_EVERY = 13, 5
#: Workers that share rows, on an even number of them, if any do in the job: the small model has few heads.
SHARING = 2


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        workers: Ranks.
        stage: ZeRO stage.
        micro_batch_size: Rows of a forward pass.
        packing: Whether rows hold several examples.
    """

    workers: int
    stage: int
    micro_batch_size: int
    packing: bool


@dataclass(frozen=True)
class Trial:
    """A small job with its data.

    Attributes:
        job: The job, whose model is the small one.
        model: The small model's folder.
        prepared: The prepared data, with packing and without.
        runs: Where its runs are kept.
    """

    job: Job
    model: Path
    prepared: dict[bool, Path]
    runs: Path

    def job_of(self, case: Case, checkpoint_every: int = STEPS) -> Job:
        """The job of a case."""
        values = self.job.dump()
        values["checkpoint"]["every"] = {"steps": checkpoint_every}
        values["zero"] |= {"stage": case.stage, "hpz_partition_size": 1}  # no workers of several nodes here
        shares = self.job.train.sequence_parallel_size > 1 and case.workers % SHARING == 0
        values["train"]["sequence_parallel_size"] = SHARING if shares else 1
        values["train"]["micro_batch_size"] = case.micro_batch_size
        values["cluster"]["workers"] = case.workers
        values["data"]["packing"] = case.packing
        return Job.from_values(values, self.job.folder)

    def run(self, name: str) -> Run:
        """The run of a name."""
        return Run(self.runs / name)

    def reference(self, packing: bool) -> Run:
        """The run of the plain engine."""
        return self.run(f"reference-{'packed' if packing else 'apart'}")


def make_trial(job: Job, model_folder: Path, folder: Path) -> Trial:
    """Makes the small model under ``folder`` and prepares a part of the job's data, in the cache.

    Raises:
        DataError: The model's architecture or its data will not do.
    """
    from distft.data.store import Prepared
    from distft.model import class_weights
    from distft.model.shrink import shrink
    from distft.task.prepare import prepare

    model = shrink(model_folder, folder / "model", job.seed, trust_remote_code=job.model.trust_remote_code)
    for number, (rows, tokens) in enumerate(SIZES, start=1):
        small = _small(job, model, rows, tokens)
        prepared: dict[bool, Path] = {}
        try:
            for packing in (True, False):
                values = small.dump()
                values["data"]["packing"] = packing
                prepared[packing] = prepare(Job.from_values(values, job.folder), model)
                known = Prepared.open(prepared[packing])
                class_weights(small, known.labels, known.card)  # refuses a weight for a label that is not there
        except DistftError:
            if number == len(SIZES):
                raise
        else:
            break
    return Trial(small, model, prepared, folder / "runs")


def _small(job: Job, model: Path, rows: int | None, tokens: int | None) -> Job:
    """The job over a small model and at most so many rows of the source; all else that its loss depends on is kept."""
    values = job.dump()
    values["model"] |= {"source": str(model), "sha256": None, "revision": None, "dtype": "fp32"}
    if job.model.adapter is not None:
        values["model"]["adapter"]["dropout"] = 0.0
    data = values["data"]
    if isinstance(data["source"], dict):
        data["source"] = data["source"]["train"]
    data["splits"] = {"validation": 0.0, "test": 0.0}
    data["limit"] = min(rows or job.data.limit or 0, job.data.limit or rows or 0) or None
    if tokens is not None and tokens < job.data.max_tokens:
        data |= {"max_tokens": tokens, "overlong": "truncate"}
    values["train"] |= {
        "epochs": None,
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1.0e-3,  # weights must move for a wrong gradient to show in the loss
        "validate_every": {"steps": STEPS},
        "patience": None,
        "non_finite": "stop",
    }
    values["zero"]["offload"] = "none"
    values["checkpoint"] = {"budget": "2GB"}
    values["track"] = {"tensorboard": False}
    values["search"] = None
    return Job.from_values(values, job.folder)


# --- what ranks do ---


def train(trial: Trial, cases: Sequence[tuple[str, Case]], plant: Callable[[], None] | None) -> None:
    """Trains cases one after the other as one rank; a run that is there already is gone on with.

    Args:
        trial: The small job.
        cases: The name of the run of each, and the case.
        plant: Called before, to plant a fault: a proof that cannot fail proves nothing.
    """
    if plant is not None:
        plant()
    for name, case in cases:
        _train(trial, name, trial.job_of(case))


def train_until_killed(trial: Trial, name: str, case: Case) -> None:
    """Trains as one rank; the last rank is killed (SIGKILL) after a step, as by a kernel that is out of memory."""
    from distft.train.reporter import FileReporter, Record
    from distft.world import World

    world = World.from_environment()

    class Fatal(FileReporter):
        def train(self, record: Record) -> None:
            super().train(record)
            if record["step"] == KILLED_AFTER and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    fatal = Fatal(trial.run(name), is_main=world.is_main)
    _train(trial, name, trial.job_of(case, CHECKPOINT_EVERY), fatal)


def _train(trial: Trial, name: str, job: Job, reporter: Any = None) -> None:
    from distft.train.worker import work
    from distft.world import World

    prepared = trial.prepared[job.data.packing]
    work(job, World.from_environment(), trial.run(name), prepared, trial.model, reporter, resume=True)


def train_reference(trial: Trial) -> None:
    """Trains by the plain engine in fp64, row by row and without the training loop.

    Rank 0 trains with packing and rank 1 without, neither knowing of the other.
    """
    import torch

    from distft import engine as engines
    from distft.data.store import Prepared
    from distft.ledger.plan import Plan
    from distft.model import Batch, LossModel, class_weights, load_tokenizer, pad_id, training_model
    from distft.runs import append_line
    from distft.train.schedule import learning_rate
    from distft.world import World

    packing = World.from_environment().is_main
    job, prepared = trial.job, Prepared.open(trial.prepared[packing])
    plan, run = Plan.of(job, prepared), trial.reference(packing)
    pad = pad_id(load_tokenizer(trial.model, trust_remote_code=job.model.trust_remote_code))
    model = LossModel(
        # In fp32, the engine's to cast: fresh weights of a head or an adapter are drawn differently in fp64.
        training_model(job, trial.model, torch.float32, prepared.labels, pad, packed=False),
        class_weights=class_weights(job, prepared.labels, prepared.card),
    )
    settings = engines.Settings(
        torch.float64, weight_decay=job.train.weight_decay, max_grad_norm=job.train.max_grad_norm
    )
    engine = engines.open(model, settings, World(), "plain")
    schedule = job.train.schedule
    for step in range(1, plan.order.steps + 1):
        rows = plan.step(step)
        supervised = max(1, plan.rows.supervised_tokens(rows))
        losses = [
            engine.forward_backward(
                Batch.collate([plan.rows[row]], pad), 1.0 / supervised, last=row == rows[-1], seed=0
            )
            for row in rows.tolist()
        ]
        rate = learning_rate(step, plan.order.steps, job.train.learning_rate, schedule.kind, schedule.warmup)
        record = {
            "kind": "train",
            "step": step,
            "loss": sum(float(loss) for loss in losses) / supervised,
            "grad_norm": engine.step(rate),
            "sample_digest": plan.digest(rows),
        }
        append_line(run.metrics, record)
    engine.close()

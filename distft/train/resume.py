"""Going on from a checkpoint, or saying why that cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distft.checkpoint import Checkpoint, Shards, State, Storage, sound, withdraw_after
from distft.config import Job
from distft.engine import Engine
from distft.errors import CheckpointError, DistftError, JobError
from distft.model import Batch
from distft.train.progress import Progress

#: How far the probe loss may be from the saved one: rounding on other devices and numbers of ranks, no more.
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def curve_settings(job: Job) -> dict[str, Any]:
    """The settings that the loss curve depends on beside data, stage and type, by dotted name."""
    values = job.dump()
    train, task, adapter = values["train"], values["task"], values["model"]["adapter"]
    names = ("epochs", "steps", "learning_rate", "schedule", "batch_size", "weight_decay", "max_grad_norm")
    return {
        "seed": job.seed,
        "model.source": job.model.source,
        "model.adapter": None if adapter is None else adapter["kind"],
        **{f"model.adapter.{name}": value for name, value in (adapter or {}).items()},
        **{f"task.{name}": value for name, value in task.items()},
        **{f"train.{name}": train[name] for name in names},
    }


def probe_loss(engine: Engine, batch: Batch) -> float | None:
    """The loss sum of a few tokens, the same on every rank, by which a loaded checkpoint is recognised.

    None where it is not a number: such tokens tell nothing.
    """
    loss = float(engine.losses(batch).double().sum())
    return loss if math.isfinite(loss) else None


def restore(
    engine: Engine,
    storage: Storage,
    key: bytes,
    state: State,
    probe: Callable[[], float | None],
    *,
    resume: bool,
    exploits: Sequence[Mapping[str, Any]] = (),
) -> tuple[Progress | None, list[str]]:
    """Loads the newest sound checkpoint where resuming is asked for and there is one.

    Args:
        engine: Where it is loaded; every rank calls this.
        storage: Where the run's checkpoints lie.
        key: What they are signed with.
        state: The run as it is now, at step 0.
        probe: Recomputes the loss that each checkpoint was saved with.
        resume: Whether to look for one.
        exploits: The events of the run at which population based training changed settings: checkpoints up to then
            may have those of before.

    Returns:
        How far the run has come, None without a checkpoint; and what is wrong with newer ones, which were passed over.

    Raises:
        JobError: There are checkpoints and resuming was not asked for, or the run was another one.
        CheckpointError: There are checkpoints, and all are damaged.
    """
    found = sound(storage, key) if engine.world.is_main else iter(())
    problems: list[str] = []
    while (one := engine.broadcast(_next(found))) is not None:
        if isinstance(one, DistftError):
            raise one
        if not resume:
            raise JobError(
                "the run has checkpoints already", where=str(storage), fix="go on with --resume, or take another --name"
            )
        if isinstance(one, Checkpoint):
            _check_same(one.state, state, exploits)
            problem = _taken_up(engine, one, probe)
            if problem is None:
                if engine.world.is_main:
                    withdraw_after(storage, one.step)
                engine.barrier()
                return _progress(one.state), problems
            problems.append(problem)
        else:
            problems.append(one)
    if problems:
        raise CheckpointError("; ".join(problems), fix="no other checkpoint is left: start again with another --name")
    return None, []


def _next(found: Iterator[Checkpoint | str]) -> Checkpoint | str | DistftError | None:
    """What comes next; an error is a value here, since rank 0 alone looks, and all ranks must hear of it."""
    try:
        return next(found, None)
    except DistftError as error:
        return error
    except OSError as error:
        return CheckpointError(f"the checkpoints cannot be read: {error}")


def _taken_up(engine: Engine, checkpoint: Checkpoint, probe: Callable[[], float | None]) -> str | None:
    """Loads a checkpoint into every rank; what is wrong with it, the same on all of them, or None."""
    problem = None
    try:
        with checkpoint.shards() as files:
            engine.restore(Shards(files))
    except CheckpointError as error:
        problem = str(error)
    first: str | None = next((one for one in engine.gather(problem) if one is not None), None)
    if first is not None:
        return first
    now, then = probe(), checkpoint.state.probe_loss
    if then is None or (now is not None and abs(now - then) <= PROBE_TOLERANCE[checkpoint.state.dtype] * abs(then)):
        return None
    return f"{checkpoint.place}: its weights give another loss ({now}) than when they were saved ({then})"


def _progress(saved: State) -> Progress:
    return Progress(
        saved.step, saved.best_step, saved.best_loss, saved.validations_without_gain, tuple(saved.skipped_steps)
    )


def _check_same(saved: State, now: State, exploits: Sequence[Mapping[str, Any]]) -> None:
    """Refuses to go on as another run, with everything that differs; ranks and ZeRO stage may."""
    earlier = [item for exploit in exploits if exploit["step"] >= saved.step for item in exploit["before"].items()]
    pairs = {
        "model.dtype": (saved.dtype, now.dtype),
        "the prepared data": (saved.data_fingerprint, now.data_fingerprint),
        "the labels": (saved.labels, now.labels),
        **{
            name: (saved.settings.get(name), now.settings.get(name))
            for name in sorted(saved.settings.keys() | now.settings.keys())
        },
    }
    changed = [
        f"{name} was {before}, is {after}"
        for name, (before, after) in pairs.items()
        if before != after and (name, before) not in earlier
    ]
    if changed:
        raise JobError(
            f"this is not the job that the checkpoint is of: {'; '.join(changed)}",
            where=f"step {saved.step}",
            fix="resume with the job as it was, or start a new run with another --name",
        )

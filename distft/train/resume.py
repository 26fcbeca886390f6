"""Going on from a checkpoint, or saying why that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distft.checkpoint import Checkpoint, State, newest_sound, withdraw_after
from distft.config import Job
from distft.engine import Engine
from distft.errors import CheckpointError, JobError
from distft.train.loop import Progress


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


def restore(engine: Engine, root: Path, state: State, *, resume: bool) -> tuple[Progress, list[str]]:
    """Loads the newest sound checkpoint where resuming is asked for and there is one.

    Args:
        engine: Where it is loaded; every rank calls this.
        root: The run's checkpoints.
        state: The run as it is now, at step 0.
        resume: Whether to look for one.

    Returns:
        How far the run has come, and what is wrong with newer checkpoints, which were passed over.

    Raises:
        JobError: There are checkpoints and resuming was not asked for, or the run was another one.
        CheckpointError: There are checkpoints, and all are damaged.
    """
    found: tuple[Checkpoint | None, list[str]] = (None, [])
    if engine.world.is_main:
        found = newest_sound(root)
    checkpoint, problems = engine.broadcast(found)
    if not resume and (checkpoint is not None or problems):
        raise JobError(
            "the run has checkpoints already", where=str(root), fix="go on with --resume, or take another --name"
        )
    if checkpoint is None:
        if problems:
            raise CheckpointError(
                "; ".join(problems), fix="no other checkpoint is left: start again with another --name"
            )
        return Progress(), []
    _check_same(checkpoint.state, state)
    if engine.world.is_main:
        withdraw_after(root, checkpoint.step)
    engine.load(checkpoint.folder)
    saved = checkpoint.state
    return Progress(saved.step, saved.best_step, saved.best_loss, saved.validations_without_gain), problems


def _check_same(saved: State, now: State) -> None:
    """Refuses to go on as another run, with everything that differs."""
    if saved.world_size != now.world_size:
        raise JobError(
            f"resuming on {now.world_size} workers is not built yet: the checkpoint is of {saved.world_size}",
            where="cluster.workers",
            fix=f"resume on {saved.world_size} workers",
        )
    pairs = {
        "zero.stage": (saved.zero_stage, now.zero_stage),
        "model.dtype": (saved.dtype, now.dtype),
        "the prepared data": (saved.data_fingerprint, now.data_fingerprint),
        "the labels": (saved.labels, now.labels),
        **{
            name: (saved.settings.get(name), now.settings.get(name))
            for name in sorted(saved.settings.keys() | now.settings.keys())
        },
    }
    changed = [f"{name} was {before}, is {after}" for name, (before, after) in pairs.items() if before != after]
    if changed:
        raise JobError(
            f"this is not the job that the checkpoint is of: {'; '.join(changed)}",
            where=f"step {saved.step}",
            fix="resume with the job as it was, or start a new run with another --name",
        )

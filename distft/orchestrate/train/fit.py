"""One group of workers as Ray Train: a TorchTrainer around the worker function that also runs under torchrun.

Ray Train starts the group once and tells how it ended; what comes next is :mod:`.policy`'s to say.
Checkpoints are ours, so Ray's snapshot of a run is never read: each group has a Ray name of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import DistftError
from distft.orchestrate.train.failure import failure_of
from distft.orchestrate.train.places import group_name, write_place
from distft.orchestrate.train.policy import Failure
from distft.runs import Run
from distft.train import Attempt, Outcome
from distft.world import World


@dataclass(frozen=True)
class Assignment:
    """Everything that a worker needs to know; it crosses the cluster by pickling."""

    job: Job
    run: Run
    prepared: Path
    model: Path
    cache: Path
    threads: int
    attempt: Attempt


def worker(config: dict[str, Any]) -> Outcome | DistftError:
    """What each Ray Train worker runs.

    An error that every rank raises together (a NaN loss, wrong data) is returned, not raised: it would be taken for a
    lost worker and the group started again, only to fail at the same place.
    """
    assignment: Assignment = config["assignment"]
    os.environ["DISTFT_CACHE"] = str(assignment.cache)
    world = World.from_environment()
    log_to(assignment.run.logs / f"rank-{world.rank}.log")
    write_place(assignment.run, world.rank, assignment.attempt.began or 0.0)
    import torch

    from distft.train.worker import work

    torch.set_num_threads(assignment.threads)
    try:
        return work(
            assignment.job,
            world,
            assignment.run,
            assignment.prepared,
            assignment.model,
            resume=True,  # a fresh run's folder holds no checkpoint; after a lost worker there is one
            attempt=assignment.attempt,
        )
    except DistftError as error:
        return error


def log_to(path: Path) -> None:
    """Sends what this process prints, and what its libraries print, to a file in the run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


@contextlib.contextmanager
def logged_to(path: Path, name: str) -> Iterator[None]:
    """Sends what a library of Ray's says to a file; a person is told by the run's events."""
    logger = logging.getLogger(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        handler.close()


def fit(
    assignment: Assignment,
    workers: int,
    need: Mapping[str, float],
    selectors: Sequence[Mapping[str, str]] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Outcome | Failure:
    """Runs one group of workers to its end; blocks until then.

    Args:
        assignment: What each of them does.
        workers: How many.
        need: What each of them holds.
        selectors: Labels of the node that each may run on; rank 0 is with the first.
        environment: The runtime environment of their processes (:mod:`.standby`); None for the job's.

    Returns:
        How training ended, or how the group failed.

    Raises:
        DistftError: What the workers agreed to stop for.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from distft.orchestrate.train.trainer import Torch, Trainer

    run, gpus = assignment.run, need.get("GPU", 0) > 0
    trainer = Trainer(
        worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker=dict(need),
            label_selector=None if selectors is None else [dict(selector) for selector in selectors],
        ),
        torch_config=Torch(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=group_name(run, assignment.attempt.began or 0.0),
            storage_path=str(run.logs / "ray"),
            worker_runtime_env=None if environment is None else dict(environment),
            # A group that could not start is told like any other: Ray would try for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        with logged_to(run.logs / "ray-train.log", "ray.train"):
            outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        return failure_of(error)
    if isinstance(outcome, DistftError):
        raise outcome
    assert isinstance(outcome, Outcome)
    return outcome

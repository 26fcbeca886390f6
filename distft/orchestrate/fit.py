"""Training as Ray Train: one TorchTrainer around the worker function that also runs under torchrun."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import DistftError, RunError
from distft.runs import Run
from distft.train import Outcome
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


def worker(config: dict[str, Any]) -> Outcome | DistftError:
    """What each Ray Train worker runs.

    An error that every rank raises together (a NaN loss, wrong data) is returned, not raised: Ray would take it
    for a lost worker and start the group again, only to fail at the same place.
    """
    from distft.train.worker import work

    assignment: Assignment = config["assignment"]
    os.environ["DISTFT_CACHE"] = str(assignment.cache)
    world = World.from_environment()
    _log_to(assignment.run.logs / f"rank-{world.rank}.log")

    import torch

    torch.set_num_threads(assignment.threads)
    try:
        return work(
            assignment.job,
            world,
            assignment.run,
            assignment.prepared,
            assignment.model,
            resume=True,  # a fresh run's folder holds no checkpoint; after a lost worker there is one
        )
    except DistftError as error:
        return error


def _log_to(path: Path) -> None:
    """Sends what this process prints, and what its libraries print, to a file in the run's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def fit(assignment: Assignment, workers: int, need: dict[str, float]) -> Outcome:
    """Trains on ``workers`` Ray Train workers that each hold ``need``; blocks until they end.

    Raises:
        DistftError: What the workers agreed to stop for.
        RunError: A worker failed more often than ``cluster.max_failures``.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    job, run = assignment.job, assignment.run
    trainer = TorchTrainer(
        worker,
        train_loop_config={"assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=need.get("GPU", 0) > 0, resources_per_worker=dict(need)
        ),
        torch_config=TorchConfig(backend="nccl" if need.get("GPU", 0) > 0 else "gloo"),
        run_config=RunConfig(
            # A name of its own each time: Ray's snapshot is not what a run resumes from, our checkpoints are.
            name=f"{run.name}-{time.time_ns()}",
            storage_path=str(run.logs / "ray"),
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise RunError(_cause(error), fix=f"the workers' logs are in {run.logs}") from error
    if isinstance(outcome, DistftError):
        raise outcome
    assert isinstance(outcome, Outcome)
    return outcome


def _cause(error: BaseException) -> str:
    """The same failure said once, with the ranks that it struck."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    by_text: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        text = str(failure).strip().splitlines()[-1] if str(failure).strip() else type(failure).__name__
        by_text.setdefault(text, []).append(rank)
    if not by_text:
        return f"training failed: {error}"
    return "training failed: " + "; ".join(
        f"[rank {', '.join(map(str, ranks))}] {text}" for text, ranks in by_text.items()
    )

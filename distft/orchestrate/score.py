"""Scoring as Ray tasks: each worker does its share of the work with each model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from distft.config import Job
from distft.evaluation import Scored, Subject, Unit, deal, score
from distft.orchestrate.cluster import workers_of


def score_on_cluster(
    subjects: Sequence[Subject],
    work: Sequence[Unit],
    job: Job,
    need: dict[str, float],
    progress: Callable[[int, int], None],
) -> list[list[Scored]]:
    """Does the same work with each model.

    Args:
        subjects: The models and what they are scored on.
        work: Units of work; how they are dealt does not matter to what comes of them.
        job: The job, for its number of workers.
        need: What one worker holds.
        progress: Told how many units of how many are done.

    Returns:
        For each model what came of each unit, over all workers.
    """
    import ray

    task = ray.remote(_score_share).options(
        num_cpus=need.get("CPU", 1),
        num_gpus=need.get("GPU", 0),
        resources={name: amount for name, amount in need.items() if name not in ("CPU", "GPU")},
        max_retries=job.cluster.max_failures,
        num_returns="streaming",  # a unit's result is there as soon as it is done, and the model is loaded once
    )
    shares = deal(work, workers_of(job).max)
    owners = {task.remote(subject, share): number for number, subject in enumerate(subjects) for share in shares}
    results: list[list[Scored]] = [[] for _ in subjects]
    total = len(subjects) * len(work)
    while owners:
        (ready,), _ = ray.wait(list(owners), num_returns=1)
        try:
            results[owners[ready]].append(ray.get(next(ready)))
        except StopIteration:
            del owners[ready]
        else:
            progress(sum(map(len, results)), total)
    return results


def _score_share(subject: Subject, share: list[Unit]) -> Iterator[Scored]:
    """What one worker does."""
    yield from score(subject, share)

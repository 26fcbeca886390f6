"""Scoring as Ray tasks: each worker scores its share of the rows with each model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distft.config import Job
from distft.evaluation import DocumentScore, merge, score
from distft.orchestrate.cluster import workers_of


def score_on_cluster(
    models: list[Path],
    prepared: Path,
    split: str,
    indices: np.ndarray,
    dtype: str,
    job: Job,
    need: dict[str, float],
) -> list[list[DocumentScore]]:
    """Scores rows of a split with each model.

    Args:
        models: Hugging Face folders that every node sees.
        prepared: The prepared data's folder.
        split: Which split.
        indices: Which of its rows.
        dtype: The dtype of the training, "bf16" or "fp32".
        job: The job, for its number of workers.
        need: What one worker holds.

    Returns:
        For each model the scores of the documents, over all workers.
    """
    import ray

    shares = [share for share in np.array_split(indices, workers_of(job)) if len(share)]
    task = ray.remote(_score_share).options(
        num_cpus=need.get("CPU", 1),
        num_gpus=need.get("GPU", 0),
        resources={name: amount for name, amount in need.items() if name not in ("CPU", "GPU")},
        max_retries=job.cluster.max_failures,
    )
    pending = [
        [task.remote(model, prepared, split, share, dtype, job.model.trust_remote_code) for share in shares]
        for model in models
    ]
    return [merge(part for parts in ray.get(shares) for part in parts) for shares in pending]


def _score_share(
    model: Path, prepared: Path, split: str, indices: np.ndarray, dtype: str, trust_remote_code: bool
) -> list[DocumentScore]:
    """What one worker scores."""
    from distft.data.store import Prepared

    rows = Prepared.open(prepared).rows(split)
    return score(model, rows, indices, dtype=dtype, trust_remote_code=trust_remote_code)

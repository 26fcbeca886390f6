"""What a run was to use in each step: its prepared rows and their order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distft.config import Job
from distft.data.order import Order, sample_digest
from distft.data.store import CARD, Prepared, Rows
from distft.errors import DataError
from distft.runs import Run, read_json
from distft.world import cache_folder


@dataclass(frozen=True)
class Plan:
    """The rows of every step. Steps count from 1, as in ``metrics.jsonl``.

    Attributes:
        prepared: The prepared data.
        rows: Its training rows.
        order: Which of them make up which step.
    """

    prepared: Prepared
    rows: Rows
    order: Order

    @classmethod
    def of(cls, job: Job, prepared: Prepared) -> Plan:
        """The plan of a job over its prepared data."""
        rows = prepared.rows("train")
        return cls(prepared, rows, Order.of(job, len(rows)))

    def step(self, step: int) -> NDArray[np.int64]:
        """The numbers of a step's rows, (B,) or fewer in the last one."""
        return self.order.step(step - 1)

    def digest(self, rows: NDArray[np.int64]) -> str:
        """What ``sample_digest`` of a step of these rows must be."""
        return sample_digest(self.rows.ids[rows].tolist())


def plan_of(job: Job, run: Run) -> Plan:
    """The plan of a run, from the prepared data that it was trained on; nothing is prepared or fetched.

    Args:
        job: The run's job.
        run: The run; its data card tells the fingerprint of its data.

    Raises:
        DataError: The prepared data is gone from the cache, or damaged.
    """
    return Plan.of(job, Prepared.open(_prepared(job, run)))


def _prepared(job: Job, run: Run) -> Path:
    """The folder in the cache whose rows have the run's fingerprint."""
    cache = cache_folder() / "prepared"
    again = (
        f"make it again from the job's file in {job.folder}: distft prepare JOB; or name its cache: DISTFT_CACHE=DIR"
    )
    if not run.card.exists():
        raise DataError("the run has no data card: it ended before its data was ready", where=str(run.card))
    fingerprint = read_json(run.card)["fingerprint"]
    for card in sorted(cache.glob(f"*/{CARD}")):
        if read_json(card)["fingerprint"] == fingerprint:
            return card.parent
    raise DataError(
        f"the prepared data of this run is no longer in the cache (fingerprint {fingerprint[:12]})",
        where=str(cache),
        fix=again,
    )

"""How the global batch is divided over workers and passes.

The rows of a step are cut into consecutive micro-batches, and micro-batch ``g = pass * world_size + rank`` goes to
``rank``. Which rows share a micro-batch therefore depends on the micro-batch size alone, and any number of workers
serves any batch size: a worker without a micro-batch in the last pass runs an empty one. Where workers share rows, a
group of them is in the place of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from distft.errors import JobError

Indices = npt.NDArray[np.int64]

#: Tokens of one forward pass that keep the device busy without costing memory: on a CPU longer passes gain nothing.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class BatchPlan:
    """The division of a global batch.

    Attributes:
        batch_size: Rows per optimizer step over all workers.
        world_size: Number of workers.
        micro_batch_size: Rows per forward pass on one worker.
        reason: Why the micro-batch has this size.
        sequence_parallel_size: Workers, one after the other, that share rows: a divisor of their number.
    """

    batch_size: int
    world_size: int
    micro_batch_size: int
    reason: str
    sequence_parallel_size: int = 1

    @classmethod
    def solve(
        cls,
        batch_size: int,
        world_size: int,
        micro_batch_size: int | Literal["auto"],
        max_tokens: int,
        device_type: str,
        *,
        sequence_parallel_size: int = 1,
        most_workers: int | None = None,
        micro_batch_limit: int | None = None,
    ) -> BatchPlan:
        """Chooses the micro-batch size.

        Args:
            batch_size: Rows per optimizer step over all workers.
            world_size: Number of workers.
            micro_batch_size: Rows per pass as the job asks, or ``auto``.
            max_tokens: Tokens in a row.
            device_type: ``cpu`` or ``cuda``.
            sequence_parallel_size: Workers that share rows.
            most_workers: The most workers that there may be, at other times of the run too: the micro-batch suits all
                numbers up to it, so that dropout, drawn per micro-batch, does not change with them.
            micro_batch_limit: The most rows that fit into memory, where that was learnt.

        Raises:
            JobError: A size is not positive.
        """
        sizes = {"train.batch_size": batch_size, "cluster.workers": world_size, "data.max_tokens": max_tokens}
        if micro_batch_size != "auto":
            sizes["train.micro_batch_size"] = micro_batch_size
        for key, size in sizes.items():
            if size < 1:
                raise JobError(f"{size} is not a positive number", where=key)
        share = math.ceil(batch_size / max(1, max(world_size, most_workers or 0) // sequence_parallel_size))
        if micro_batch_size == "auto":
            budget = TOKENS_PER_PASS[device_type] * sequence_parallel_size
            wanted = max(1, budget // max_tokens)
            reason = f"about {budget:,} tokens a pass on {device_type}, rows of {max_tokens:,}"
        else:
            wanted = micro_batch_size
            reason = "set in the job"
        if wanted > share:
            reason += f"; no more than a worker's share of the batch, {share}"
        size = min(wanted, share)
        if micro_batch_limit is not None and size > micro_batch_limit:
            size = micro_batch_limit
            reason += f"; more than {micro_batch_limit} ran out of memory"
        return cls(batch_size, world_size, size, reason, sequence_parallel_size)

    @property
    def groups(self) -> int:
        """Groups of workers that are each given micro-batches of their own (data parallel size)."""
        return self.world_size // self.sequence_parallel_size

    def group_of(self, rank: int) -> int:
        """The group that a worker is in."""
        return rank // self.sequence_parallel_size

    def accumulation(self, rows: int) -> int:
        """Passes that every worker makes for a step of so many rows; the short last step may need fewer."""
        return math.ceil(math.ceil(rows / self.micro_batch_size) / self.groups)

    def micro_batches(self, indices: Indices, rank: int) -> list[Indices]:
        """The micro-batches of ``rank``, one per pass, for a step of these rows.

        Returns:
            ``accumulation(len(indices))`` arrays; those past the end of the rows are empty.
        """
        size, group = self.micro_batch_size, self.group_of(rank)
        starts = ((number * self.groups + group) * size for number in range(self.accumulation(len(indices))))
        return [indices[start : start + size] for start in starts]

"""Which rows make up step s: invariant 1.

The rows of a step are a pure function of (number of rows, seed, step). An epoch is a pseudo-random permutation of
0 .. rows - 1 that can be asked for one position at a time, so that seeking to any step costs the same: a balanced
Feistel network over the next power of four, with cycle walking back into the range (J. Black and P. Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002). It is a shuffle, not a secret: the round function only has to mix well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from distft.config import Job

_ROUNDS = 8
#: Positions that are permuted at a time, so that a long order needs little memory beside its rows.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Order:
    """The order in which rows are used.

    Attributes:
        rows: Rows in an epoch, at least 1.
        seed: The job's seed.
        batch_size: Rows in a step (global batch).
        total_rows: Rows used over the whole training, epochs counted; the last step may be short.
    """

    rows: int
    seed: int
    batch_size: int
    total_rows: int

    def __post_init__(self) -> None:
        """Refuses an order without rows: a bug of the caller, not of a person's data."""
        if self.rows < 1 or self.batch_size < 1 or self.total_rows < 0:
            raise ValueError(f"no order of rows can be made of {self}")

    @classmethod
    def of(cls, job: Job, rows: int) -> Order:
        """The order in which a job uses its training rows, of which there are so many."""
        train = job.train
        total = train.steps * train.batch_size if train.steps else math.ceil((train.epochs or 1) * rows)
        return cls(rows, job.seed, train.batch_size, total)

    @property
    def steps(self) -> int:
        """Number of steps, the short last one included."""
        return -(-self.total_rows // self.batch_size)

    def step(self, step: int) -> NDArray[np.int64]:
        """Row indices of 0-based ``step``, int64 (B,) or fewer in the last one; O(B) work whatever the step.

        Raises:
            IndexError: There is no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        return self._between(step * self.batch_size, (step + 1) * self.batch_size)

    def first(self, steps: int) -> list[NDArray[np.int64]]:
        """Row indices of the first ``steps`` steps, or of all: as :meth:`step` gives them, in much less time."""
        rows = self._between(0, steps * self.batch_size)
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _between(self, first: int, last: int) -> NDArray[np.int64]:
        """The rows used as number ``first`` to before ``last`` of the whole training, or to its end."""
        last = min(last, self.total_rows)
        pieces = [np.array([], dtype=np.int64)]
        while first < last:
            epoch, offset = divmod(first, self.rows)
            count = min(last - first, self.rows - offset, _BLOCK)
            positions = np.arange(offset, offset + count, dtype=np.uint64)
            pieces.append(permute(positions, self.rows, _round_keys(self.seed, epoch)))
            first += count
        return np.concatenate(pieces)


def permute(positions: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a keyed permutation of 0 .. size - 1 sends ``positions``, int64 of the same shape.

    The network's domain is at most four times ``size``, so a position walks four times on average at most.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    result = positions.copy()
    walking = np.arange(len(positions))
    while len(walking):
        result[walking] = _feistel(result[walking], half_bits, keys)
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"distft order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def sample_digest(row_ids: Iterable[int]) -> str:
    """32 hex digits that stand for the ordered ids of a step's rows."""
    ids = np.fromiter(row_ids, dtype="<u8")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


def sampled_rows(rows: int, samples: int, seed: int) -> NDArray[np.int64]:
    """Which rows of a split are scored: all, or ``samples`` of them drawn by ``seed``, the same for every model."""
    if rows <= samples:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, size=samples, replace=False))

"""The weights of a mixture: how often a training document is used in an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distft.data import digests


def copies(
    weights: Sequence[float],
    source: NDArray[np.int32],
    content: NDArray[np.uint64],
    training: NDArray[np.bool_],
    seed: int,
) -> NDArray[np.int32]:
    """Times that each document is used, int32 (documents,): 1 outside the training split.

    A weight of 2.3 uses each document twice, and ``floor(0.3 * documents + 1/2)`` of them once more, drawn by the seed
    and what they hold, never by where they stand. Sources of the same weight are drawn from together.

    Args:
        weights: The weight of each source.
        source: The source of each document.
        content: Digest of what each document holds, (documents, 2).
        training: Whether a document is trained on at all.
        seed: The job's seed.
    """
    times = np.ones(len(source), dtype=np.int32)
    table = np.asarray(weights, dtype=np.float64)
    for weight in sorted({*weights} - {1.0}):
        chosen = np.flatnonzero((table == weight)[source] & training)
        times[chosen] = int(weight)
        once_more = int((weight - int(weight)) * len(chosen) + 0.5)
        if once_more:
            times[chosen[digests.drawn(content[chosen], f"distft mixture {seed}")[:once_more]]] += 1
    return times

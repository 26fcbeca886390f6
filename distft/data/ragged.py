"""Runs of different lengths, end to end, in flat arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def begins(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where each run begins, and where the last ends: int64 (runs + 1,)."""
    result = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=result[1:])
    return result


def ranges(firsts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """``firsts[i]``, ``firsts[i] + 1``, ... (``counts[i]`` of them) for each i, end to end."""
    before = begins(counts)
    result = np.arange(before[-1], dtype=np.int64)
    result += np.repeat(np.asarray(firsts, dtype=np.int64) - before[:-1], counts)
    return result

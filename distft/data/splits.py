"""Which documents are trained on, validated on, and sealed away: fixed by content and seed alone.

A unit is what may not be torn apart: the documents of one group, or, without groups, all copies of one text. Units are
ordered by a keyed hash of (seed, unit), and whole units are taken until a split has its share: test first, then
validation, the rest is for training. The order of rows, the files' names and the tokenizer play no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from distft.data import digests
from distft.errors import DataError

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


def assign(
    units: NDArray[np.uint64], shares: Mapping[str, float], seed: int, strata: NDArray[np.int32] | None = None
) -> NDArray[np.int8]:
    """The split of each document, int8 (documents,), an index into ``SPLITS``.

    A split gets ``floor(share * documents + 1/2)`` documents exactly where every unit holds one document, and otherwise
    less than one unit more. With ``strata`` this holds in each stratum up to rounding, and the rounding is
    carried from stratum to stratum so that it does not add up.

    Args:
        units: Digest of the unit of each document, uint64 (documents, 2).
        shares: Wanted share of "validation" and "test", 0 .. 1.
        seed: The job's seed.
        strata: The stratum of each document, numbered in the order of their names; a unit in several goes with the
            one most of its documents are in.
    """
    found, unit_of = digests.distinct(units)
    sizes = np.bincount(unit_of, minlength=len(found))
    ranked = digests.drawn(found, f"distft split {seed}")
    groups = [ranked]
    if strata is not None:
        stratum_of = _majority(unit_of, strata)[ranked]
        by_stratum = np.argsort(stratum_of, kind="stable")
        groups = np.split(ranked[by_stratum], np.flatnonzero(np.diff(stratum_of[by_stratum])) + 1)
    split_of = np.full(len(found), TRAIN, dtype=np.int8)
    for split in (TEST, VALIDATION):
        share, seen, taken = shares.get(SPLITS[split], 0.0), 0, 0
        for group in groups:
            seen += int(sizes[group].sum())
            wanted = math.floor(share * seen + 0.5)
            left = group[split_of[group] == TRAIN]
            before = taken + np.cumsum(sizes[left]) - sizes[left]
            chosen = left[before < wanted]
            split_of[chosen] = split
            taken += int(sizes[chosen].sum())
    return split_of[unit_of]


def _majority(units: NDArray[np.int32], strata: NDArray[np.int32]) -> NDArray[np.int64]:
    """The stratum of each unit: the one most of its documents are in, the first of these where several are."""
    span = int(strata.max(initial=0)) + 1
    pairs, counts = np.unique(units.astype(np.int64) * span + strata, return_counts=True)
    best = np.lexsort((pairs % span, -counts, pairs // span))
    firsts = np.unique(pairs[best] // span, return_index=True)[1]
    result: NDArray[np.int64] = pairs[best][firsts] % span
    return result


def refuse_empty(rows: Mapping[str, int], documents: Mapping[str, int], shares: Mapping[str, float]) -> None:
    """Refuses a split that was asked for and holds nothing.

    Args:
        rows: Rows of each split, after cutting and packing.
        documents: Documents of each split, before.
        shares: Share asked for, 1 for a split with a source of its own; 0 or none asks for no split ("train" is
            always asked for).

    Raises:
        DataError: With the counts and what to set.
    """
    total = sum(documents.values())
    counts = ", ".join(f"{split} {documents.get(split, 0)}" for split in SPLITS)
    for split in SPLITS:
        wanted = shares.get(split, 0.0)
        if rows.get(split, 0) or (split != "train" and not wanted):
            continue
        if documents.get(split, 0):
            raise DataError(
                f"all {documents[split]} documents of the {split} split were dropped or hold nothing to predict",
                where="data.splits",
                fix="set data.overlong to truncate or split, or raise data.max_tokens",
            )
        if wanted == 1:
            advice = f"give files that hold text under data.source.{split}"
        elif split == "train":
            advice = "lower data.splits.validation and data.splits.test, or add documents"
        else:
            advice = (
                f"set data.splits.{split} to at least {math.ceil(5000 / max(total, 1)) / 10000:g}, "
                f"or to 0 for none, or give at least {math.ceil(0.5 / wanted)} documents"
            )
        raise DataError(f"the {split} split is empty: of {total} documents {counts}", where="data.splits", fix=advice)

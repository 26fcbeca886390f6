"""Which documents are trained on, validated on, and sealed away: fixed by content and seed alone.

A unit is what may not be torn apart: the documents of one group, or, without groups, all copies of one text. Units are
ordered by a keyed hash of (seed, unit), and whole units are taken until a split has its share: test first, then
validation, the rest is for training. The order of rows, the files' names and the tokenizer play no part.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from distft.errors import DataError

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


def assign(
    units: Sequence[bytes], shares: Mapping[str, float], seed: int, strata: Sequence[str] | None = None
) -> NDArray[np.int8]:
    """The split of each document, int8 (documents,), an index into ``SPLITS``.

    A split gets ``floor(share * documents + 1/2)`` documents exactly where every unit holds one document, and otherwise
    less than one unit more. With ``strata`` this holds in each stratum up to rounding, and the rounding is
    carried from stratum to stratum so that it does not add up.

    Args:
        units: The unit of each document.
        shares: Wanted share of "validation" and "test", 0 .. 1.
        seed: The job's seed.
        strata: The stratum of each document; a unit in several goes with the one most of its documents are in.
    """
    sizes = Counter(units)
    key = f"distft split {seed}".encode()
    ranked = sorted(sizes, key=lambda unit: (hashlib.blake2b(unit, key=key, digest_size=16).digest(), unit))
    split_of = dict.fromkeys(ranked, TRAIN)
    by_stratum: dict[str, list[bytes]] = {}
    stratum_of = _majority(units, strata) if strata is not None else {}
    for unit in ranked:
        by_stratum.setdefault(stratum_of.get(unit, ""), []).append(unit)

    for split in (TEST, VALIDATION):
        share, seen, taken = shares.get(SPLITS[split], 0.0), 0, 0
        for stratum in sorted(by_stratum):
            seen += sum(sizes[unit] for unit in by_stratum[stratum])
            wanted = math.floor(share * seen + 0.5)
            for unit in by_stratum[stratum]:
                if taken >= wanted:
                    break
                if split_of[unit] == TRAIN:
                    split_of[unit] = split
                    taken += sizes[unit]
    return np.fromiter((split_of[unit] for unit in units), dtype=np.int8, count=len(units))


def _majority(units: Sequence[bytes], strata: Sequence[str]) -> dict[bytes, str]:
    counts: dict[bytes, Counter[str]] = {}
    for unit, stratum in zip(units, strata, strict=True):
        counts.setdefault(unit, Counter())[stratum] += 1
    return {unit: min(count, key=lambda name: (-count[name], name)) for unit, count in counts.items()}


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

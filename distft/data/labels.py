"""The labels of a classification: their names, and the number that stands for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.data.splits import SPLITS, TRAIN
from distft.errors import DataError

_LISTED = 5


@dataclass(frozen=True)
class Labels:
    """The labels of all documents.

    Attributes:
        names: The labels, in the order of their numbers; empty where the task has none.
        numbers: int32 (documents,), the number of each document's label; -1 where it has none or is not used.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int32]

    def counts(self, splits: NDArray[np.int8], copies: NDArray[np.int32]) -> dict[str, dict[str, int]]:
        """Documents of each label in each split, as often as an epoch uses them."""
        result = {}
        for number, split in enumerate(SPLITS):
            chosen = (splits == number) & (self.numbers >= 0)
            found = np.bincount(self.numbers[chosen], weights=copies[chosen], minlength=len(self.names))
            result[split] = {name: int(count) for name, count in zip(self.names, found, strict=True)}
        return result


def number(
    codes: NDArray[np.int32],
    found: Sequence[str],
    splits: NDArray[np.int8],
    given: Sequence[str] | None,
    place: Callable[[int], dict[str, Any]],
) -> Labels:
    """Numbers the labels: those given, else those of the training split, sorted (as numbers where all are integers).

    Args:
        codes: The label of each document as a place in ``found``, int32 (documents,); -1 where it has none or is not
            used.
        found: The labels of all documents.
        splits: The split of each document.
        given: The labels that the job names.
        place: Where a document stands, {"source", "row"}.

    Raises:
        DataError: A document has a label that is not among them, or there are fewer than two.
    """
    if not (codes >= 0).any():
        return Labels((), codes)
    if given is None:
        trained = np.unique(codes[(splits == TRAIN) & (codes >= 0)]).tolist()
        names = tuple(sorted((found[code] for code in trained), key=_rank([found[code] for code in trained])))
    else:
        names = tuple(given)
    number_of = {name: place for place, name in enumerate(names)}
    table = np.array([number_of.get(name, -1) for name in found], dtype=np.int32)
    numbers = np.where(codes >= 0, table[codes], np.int32(-1)).astype(np.int32)
    _refuse_unknown(np.flatnonzero((codes >= 0) & (numbers < 0)), codes, found, splits, given, place)
    if len(names) < 2:
        raise DataError(
            f"all training documents have the label {names[0]!r}: there is nothing to tell apart",
            where="task.label",
            fix="give documents of two labels at least, or name another column",
        )
    return Labels(names, numbers)


def _rank(names: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    try:
        ranks = {name: int(name) for name in names}
    except ValueError:
        return lambda name: (0, name)
    return lambda name: (ranks[name], name)


def _refuse_unknown(
    unknown: NDArray[np.int64],
    codes: NDArray[np.int32],
    found: Sequence[str],
    splits: NDArray[np.int8],
    given: Sequence[str] | None,
    place: Callable[[int], dict[str, Any]],
) -> None:
    if not len(unknown):
        return
    told = []
    for document in unknown[:_LISTED].tolist():
        where = place(document)
        told.append(
            f"{found[codes[document]]!r} in the {SPLITS[splits[document]]} split "
            f"({where['source']} row {where['row']:,})"
        )
    more = f" and {len(unknown) - len(told):,} more" if len(unknown) > len(told) else ""
    lacking = "which no training document has" if given is None else "which task.labels does not name"
    fix = (
        "add training documents with this label, name all labels in task.labels, or set data.splits.stratify_by"
        if given is None
        else "add it to task.labels, or leave task.labels out"
    )
    raise DataError(f"{len(unknown):,} documents have a label {lacking}: {', '.join(told)}{more}", "task.label", fix)

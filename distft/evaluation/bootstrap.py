"""Values, intervals and differences of what was measured on documents. Legend: N documents, S numbers, R resamples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.errors import DataError
from distft.task.metrics import METRICS
from distft.task.metrics_classes import class_report

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 100  # resamples drawn at a time: 2000 of 20,000 documents would be 320 MB of counts


@dataclass(frozen=True, eq=False)
class DocumentScore:
    """What was measured on one document, or on that part of it that was scored.

    Attributes:
        document: The document's number in the prepared data.
        statistics: By name, (S,) each, as :mod:`distft.task.metrics` says; parts of a document add up.
    """

    document: int
    statistics: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A value with its percentile bootstrap interval (level 0.95) over ``n`` documents.

    Attributes:
        value: The value.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Documents.
        p: Of a difference: how likely one as large would be, in either direction, if there were none.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None


def merge(parts: Iterable[DocumentScore]) -> list[DocumentScore]:
    """Adds up the parts of each document."""
    merged: dict[int, dict[str, NDArray[np.float64]]] = {}
    for part in parts:
        known = merged.setdefault(part.document, {})
        for name, numbers in part.statistics.items():
            known[name] = known[name] + numbers if name in known else numbers
    return [DocumentScore(document, statistics) for document, statistics in merged.items()]


def summarise(scores: Sequence[DocumentScore], names: Sequence[str], seed: int) -> dict[str, Estimate]:
    """Each metric with its bootstrap interval over documents (Efron & Tibshirani 1993, percentile method).

    Raises:
        DataError: Nothing was scored.
    """
    result = {}
    for group in _groups(names):
        table, places = _table(scores, group)
        drawn = _resampled(table, seed)
        for name in group:
            metric, place = METRICS[name], places[METRICS[name].statistics]
            values = metric.value(drawn[:, place])
            result[name] = _estimate(float(metric.value(table.sum(0)[place])), values, len(table))
    return {name: result[name] for name in names}


def difference(
    base: Sequence[DocumentScore], tuned: Sequence[DocumentScore], names: Sequence[str], seed: int
) -> dict[str, Estimate]:
    """Tuned minus base, paired: both are resampled by the same documents, so what they share cancels.

    The p-value is twice the smaller share of resamples on one side of zero (paired bootstrap: Koehn, EMNLP 2004; the
    one added to counts: Davison & Hinkley 1997, section 4.2). It never is below 2 / (R + 1).
    """
    result = {}
    for group in _groups(names):
        before, places = _table(base, group)
        after, _ = _table(tuned, group)
        drawn_old, drawn_new = np.hsplit(_resampled(np.hstack([before, after]), seed), 2)
        for name in group:
            value, place = METRICS[name].value, places[METRICS[name].statistics]
            values = value(drawn_new[:, place]) - value(drawn_old[:, place])
            change = float(value(after.sum(0)[place]) - value(before.sum(0)[place]))
            rarer = min(int((values <= 0).sum()), int((values >= 0).sum()))
            result[name] = _estimate(change, values, len(before), p=min(1.0, 2 * (rarer + 1) / (RESAMPLES + 1)))
    return {name: result[name] for name in names}


def classes(scores: Sequence[DocumentScore], labels: Sequence[str]) -> dict[str, Any]:
    """The per-class table and the confusion matrix (:func:`distft.task.metrics_classes.class_report`)."""
    return class_report(np.stack([score.statistics["classes"] for score in scores]), labels)


def _groups(names: Iterable[str]) -> list[list[str]]:
    """Metrics apart by the documents that they are about: answers are often written to some only."""
    asked = list(names)
    groups = [[name for name in asked if METRICS[name].answers is answers] for answers in (False, True)]
    return [group for group in groups if group]


def _table(scores: Sequence[DocumentScore], names: Sequence[str]) -> tuple[NDArray[np.float64], dict[str, slice]]:
    """The statistics of some metrics: an array (N, S) by document number, and the columns of each.

    Raises:
        DataError: No document has them.
    """
    wanted = list(dict.fromkeys(METRICS[name].statistics for name in names))
    having = [score for score in scores if all(name in score.statistics for name in wanted)]
    if not having:
        raise DataError("the split has nothing to score", fix="make data.splits larger")
    having.sort(key=lambda score: score.document)
    columns = [np.stack([score.statistics[name] for score in having]) for name in wanted]
    ends = np.cumsum([column.shape[1] for column in columns]).tolist()
    places = {name: slice(end - column.shape[1], end) for name, column, end in zip(wanted, columns, ends, strict=True)}
    return np.hstack(columns), places


def _resampled(table: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums of ``table`` (N, S) over bootstrap samples of its N documents: (R, S)."""
    n = len(table)
    draw = np.random.default_rng(seed)
    shares = np.full(n, 1 / n)
    return np.concatenate([draw.multinomial(n, shares, size=_CHUNK) @ table for _ in range(RESAMPLES // _CHUNK)])


def _estimate(value: float, drawn: NDArray[np.float64], n: int, p: float | None = None) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n, p)

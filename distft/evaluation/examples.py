"""Documents for a person to look at: the worst, the middling and the best of what was scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distft.evaluation.bootstrap import DocumentScore
from distft.task.metrics import METRICS

Place = Literal["worst", "median", "best"]

#: Documents of each kind.
SHOWN = 3


@dataclass(frozen=True)
class Example:
    """A document, and where the tuned model's score on it stands among all.

    Attributes:
        document: The document's number in the prepared data.
        place: Where it stands.
        tuned: The tuned model's score on it alone.
        base: The base model's; None where that was not scored on it.
    """

    document: int
    place: Place
    tuned: float
    base: float | None


def examples(tuned: Sequence[DocumentScore], base: Sequence[DocumentScore], metric: str) -> list[Example]:
    """The worst, the median and the best documents by the tuned model's score, a few of each, no document twice.

    Args:
        tuned: The tuned model's scores.
        base: The base model's; none where it was not scored.
        metric: Its name; documents that were not scored by it are passed over.
    """
    values, before = _values(tuned, metric), _values(base, metric)
    sign = 1.0 if METRICS[metric].better == "lower" else -1.0
    order = sorted(values, key=lambda document: (-sign * values[document], document))  # worst first
    middle = max(0, (len(order) - SHOWN) // 2)
    places: dict[int, Place] = dict.fromkeys(order[:SHOWN], "worst")
    places |= {document: "best" for document in order[::-1][:SHOWN] if document not in places}
    places |= {document: "median" for document in order[middle : middle + SHOWN] if document not in places}
    ranks = {"worst": 0, "median": 1, "best": 2}
    return [
        Example(document, places[document], values[document], before.get(document))
        for document in sorted(places, key=lambda one: (ranks[places[one]], order.index(one)))
    ]


def _values(scores: Sequence[DocumentScore], metric: str) -> dict[int, float]:
    name, value = METRICS[metric].statistics, METRICS[metric].value
    return {one.document: float(value(one.statistics[name])) for one in scores if name in one.statistics}

"""Metrics of classification, from what a model says about each example.

Legend: K classes, B bins, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Bins of confidence, of equal width, as in the paper."""


def class_statistics(truth: int, predicted: int, classes: int) -> NDArray[np.float64]:
    """The statistics "classes" of one example, (3K,): by class whether it is hit, true, predicted."""
    counts = np.zeros((3, classes))
    counts[0, truth] = truth == predicted
    counts[1, truth] = 1
    counts[2, predicted] = 1
    return counts.ravel()


def bin_statistics(correct: bool, confidence: float) -> NDArray[np.float64]:
    """The statistics "bins" of one example, (2B + 1,): at its bin whether it is correct and its confidence; then 1.

    Args:
        correct: Whether the likeliest class is the true one.
        confidence: That class's probability; bin b holds those in (b / B, (b + 1) / B].
    """
    sums = np.zeros((2, BINS))
    index = min(max(int(np.ceil(confidence * BINS)) - 1, 0), BINS - 1)
    sums[:, index] = correct, confidence
    return np.append(sums.ravel(), 1.0)


def accuracy(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the examples whose likeliest class is the true one."""
    hits, support, _ = _counts(sums)
    return np.asarray(hits.sum(-1) / support.sum(-1))


def macro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the classes' F1, as in scikit-learn: over the classes that are true or predicted somewhere."""
    hits, support, predicted = _counts(sums)
    present = support + predicted > 0
    return np.asarray(_f1(hits, support, predicted).sum(-1) / present.sum(-1))


def calibration_error(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    correct, confidence = sums[..., :BINS], sums[..., BINS:-1]
    return np.asarray(np.abs(correct - confidence).sum(-1) / sums[..., -1])


def class_report(statistics: NDArray[np.float64], names: Sequence[str]) -> dict[str, Any]:
    """The per-class table and the confusion matrix.

    Args:
        statistics: The "classes" of N examples, (N, 3K).
        names: The labels by their number, K.

    Returns:
        ``{"labels": {name: {"precision", "recall", "f1", "support"}}, "confusion": K rows, one a true class, of K
        counts, one a predicted class}``. A class never predicted has precision 0, one without examples recall 0.
    """
    hits, support, predicted = _counts(statistics.sum(0))
    f1 = _f1(hits, support, predicted)
    _, is_true, is_predicted = statistics.reshape(len(statistics), 3, -1).swapaxes(0, 1)
    labels = {
        name: {
            "precision": float(hits[number] / max(predicted[number], 1)),
            "recall": float(hits[number] / max(support[number], 1)),
            "f1": float(f1[number]),
            "support": int(support[number]),
        }
        for number, name in enumerate(names)
    }
    return {"labels": labels, "confusion": (is_true.T @ is_predicted).astype(int).tolist()}


def _counts(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Hits, support and predictions of each class, (..., K) each."""
    classes = sums.shape[-1] // 3
    return sums[..., :classes], sums[..., classes : 2 * classes], sums[..., 2 * classes :]


def _f1(hits: NDArray[np.float64], support: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 TP / (2 TP + FP + FN), which is 2 TP / (support + predicted); 0 for a class that is nowhere."""
    return np.asarray(2 * hits / np.maximum(support + predicted, 1))

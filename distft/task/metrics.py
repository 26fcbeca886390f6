"""Metrics: each is a function of statistics that are summed over documents.

So one resampling of documents gives every metric's interval, and the difference of two models, without a text or a
model being looked at again. The statistics of a document are vectors by name; legend of their shapes: S numbers, K
classes.

======================================  =================================================================  ==========
metric                                  what                                                               scale
======================================  =================================================================  ==========
loss                                    negative log-likelihood per supervised token (classification:      nats
                                        per example, without class weights)
perplexity                              exp(loss)
bits_per_byte                           negative log-likelihood per UTF-8 byte of text                     bits
accuracy, macro_f1, calibration_error   :mod:`distft.task.metrics_classes`                                 0 .. 1
bleu, chrf                              :mod:`distft.task.metrics_text`; sacrebleu's own scale             0 .. 100
rouge*, exact_match, token_f1           :mod:`distft.task.metrics_text`                                    0 .. 1
stop_rate                               share of answers that the model ended by itself                    0 .. 1
length                                  mean length of an answer                                           tokens
======================================  =================================================================  ==========
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distft.config import Job
from distft.task import metrics_classes, metrics_text

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Its name in the job file.
        statistics: The name of the statistics that it is made of.
        value: Their sums over documents, (..., S), to the metric's values, (...).
        better: Whether a lower or a higher value is better; None where neither is.
        answers: Whether it is about answers that the model has to write first.
    """

    name: str
    statistics: str
    value: Callable[[Values], Values]
    better: Literal["lower", "higher"] | None
    answers: bool = False


def token_statistics(loss: float, tokens: int, text_bytes: int) -> Values:
    """The statistics "tokens", (3,): sum of token losses in nats, supervised tokens, bytes that they stand for."""
    return np.array([loss, tokens, text_bytes], dtype=np.float64)


def _loss(sums: Values) -> Values:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _bits_per_byte(sums: Values) -> Values:
    return np.asarray(sums[..., 0] / math.log(2) / sums[..., 2])


def mean_statistics(value: float) -> Values:
    """The statistics of a metric that is a mean over documents, (2,): its value on the document, and 1."""
    return np.array([value, 1.0])


def _mean(sums: Values) -> Values:
    return np.asarray(sums[..., 0] / sums[..., 1])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "tokens", _loss, "lower"),
        Metric("perplexity", "tokens", lambda sums: np.exp(_loss(sums)), "lower"),
        Metric("bits_per_byte", "tokens", _bits_per_byte, "lower"),
        Metric("accuracy", "classes", metrics_classes.accuracy, "higher"),
        Metric("macro_f1", "classes", metrics_classes.macro_f1, "higher"),
        Metric("calibration_error", "bins", metrics_classes.calibration_error, "lower"),
        Metric("bleu", "bleu", metrics_text.bleu, "higher", answers=True),
        Metric("chrf", "chrf", metrics_text.chrf, "higher", answers=True),
        *(
            Metric(name, name, _mean, "higher", answers=True)
            for name in ("rouge1", "rouge2", "rougeL", "exact_match", "token_f1", "stop_rate")
        ),
        Metric("length", "length", _mean, None, answers=True),
    )
}
"""Every metric by its name."""

_OF_PRESET = {
    "translation": ("chrf", "bleu"),
    "summarization": ("rouge1", "rouge2", "rougeL"),
    "question_answering": ("exact_match", "token_f1"),
}
_OF_KIND = {
    "language_modeling": ("loss", "perplexity", "bits_per_byte"),
    "classification": ("loss", "accuracy", "macro_f1", "calibration_error"),
}


def metrics_of(job: Job) -> tuple[str, ...]:
    """The names of the metrics that the job asks for, or else those of its task and preset."""
    if job.evaluate.metrics != "default":
        return tuple(job.evaluate.metrics)
    if job.task.kind != "generation":
        return _OF_KIND[job.task.kind]
    preset = _OF_PRESET.get(job.task.preset or "", ("rougeL", "chrf"))
    return ("loss", "perplexity", *preset, "stop_rate", "length")


def headline(job: Job) -> str:
    """The one metric that tells whether a model is better at the job's task."""
    names = metrics_of(job)
    first = {"language_modeling": "perplexity", "classification": "accuracy"}.get(job.task.kind)
    if first is None:
        first = next((name for name in names if METRICS[name].answers and METRICS[name].better), names[0])
    return first if first in names else names[0]

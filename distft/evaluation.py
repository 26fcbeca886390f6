"""Scoring a model folder on a split, and what the scores allow one to say: values with bootstrap intervals.

Language modelling is scored by document: a document's loss is the sum of its tokens' negative log-likelihoods, in
nats. Loss, perplexity and bits per byte are ratios of sums over documents, and their intervals come from resampling
documents, because the tokens of one document are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distft.errors import DataError

if TYPE_CHECKING:
    from distft.data.store import Rows

METRICS = ("loss", "perplexity", "bits_per_byte")
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class DocumentScore:
    """What was measured on one document, or on that part of it that was scored.

    Attributes:
        document: The document's number in the prepared data.
        loss: Sum of token losses, nats.
        tokens: Supervised tokens.
        bytes: UTF-8 bytes of text that those tokens stand for.
    """

    document: int
    loss: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """A value with its percentile bootstrap interval (level 0.95) over ``n`` documents."""

    value: float
    low: float
    high: float
    n: int


def score(
    model_folder: Path,
    rows: Rows,
    indices: Sequence[int] | np.ndarray,
    *,
    dtype: str,
    trust_remote_code: bool = False,
) -> list[DocumentScore]:
    """Scores rows with the model in ``model_folder``, on this process's device.

    Args:
        model_folder: A Hugging Face folder: the base model's or an export.
        rows: The split's rows.
        indices: Which of them.
        dtype: The dtype the model was trained in, "bf16" or "fp32".
        trust_remote_code: As in the job file.

    Returns:
        One score a document, in the order of first appearance.
    """
    import torch

    from distft.model import Batch, LossModel, load_model, load_tokenizer, pad_id, token_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model_folder, trust_remote_code=trust_remote_code)
    weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    model = LossModel(load_model(model_folder, weights, trust_remote_code=trust_remote_code)).to(device).eval()
    bytes_of = token_bytes(tokenizer)
    parts: list[DocumentScore] = []
    for index in indices:
        row = rows[int(index)]
        with torch.inference_mode():
            losses = model.token_losses(Batch.collate([row], pad_id(tokenizer)).to(device))[0].double().cpu().numpy()
        start = 0
        for document, length in zip(row.documents, row.segments, strict=True):
            end = start + length
            supervised = row.supervised[start:end]
            parts.append(
                DocumentScore(
                    document=document,
                    loss=float(losses[start:end].sum()),  # position t holds the loss of token t + 1: same segment
                    tokens=int(supervised.sum()),
                    bytes=int(bytes_of[row.input_ids[start:end][supervised]].sum()),
                )
            )
            start = end
    return merge(parts)


def merge(parts: Iterable[DocumentScore]) -> list[DocumentScore]:
    """Adds up the parts of each document."""
    merged: dict[int, DocumentScore] = {}
    for part in parts:
        known = merged.get(part.document, DocumentScore(part.document, 0.0, 0, 0))
        merged[part.document] = DocumentScore(
            part.document, known.loss + part.loss, known.tokens + part.tokens, known.bytes + part.bytes
        )
    return list(merged.values())


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Metric values of sums (..., 3): loss in nats, tokens, bytes."""
    loss = sums[..., 0] / sums[..., 1]
    return {
        "loss": loss,
        "perplexity": np.exp(loss),
        "bits_per_byte": sums[..., 0] / math.log(2) / sums[..., 2],
    }


def _table(scores: Sequence[DocumentScore]) -> np.ndarray:
    """Scores as an array (documents, 3) in the order of document numbers."""
    ordered = sorted(scores, key=lambda score: score.document)
    return np.array([[score.loss, score.tokens, score.bytes] for score in ordered], dtype=np.float64)


def _resampled(table: np.ndarray, seed: int) -> np.ndarray:
    """Sums of ``table`` (N, 3) over :data:`RESAMPLES` bootstrap samples of its N documents: (resamples, 3)."""
    n = len(table)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.asarray(weights @ table)


def _estimates(
    values: dict[str, np.ndarray], resampled: dict[str, np.ndarray], names: Iterable[str], n: int
) -> dict[str, Estimate]:
    tail = (1 - LEVEL) / 2
    return {
        name: Estimate(
            value=float(values[name]),
            low=float(np.quantile(resampled[name], tail)),
            high=float(np.quantile(resampled[name], 1 - tail)),
            n=n,
        )
        for name in names
    }


def summarise(scores: Sequence[DocumentScore], names: Iterable[str], seed: int) -> dict[str, Estimate]:
    """Each metric with its bootstrap interval over documents (Efron & Tibshirani 1993, percentile method).

    Raises:
        DataError: Nothing was scored.
    """
    table = _table(scores)
    if len(table) == 0 or table[:, 1].sum() == 0:
        raise DataError("the split has no supervised token to score", fix="make data.splits larger")
    return _estimates(_metrics(table.sum(0)), _metrics(_resampled(table, seed)), names, len(table))


def difference(
    base: Sequence[DocumentScore], tuned: Sequence[DocumentScore], names: Iterable[str], seed: int
) -> dict[str, Estimate]:
    """Tuned minus base, paired: both are resampled by the same documents, so what they share cancels."""
    before, after = _table(base), _table(tuned)
    sums_before, sums_after = _resampled(before, seed), _resampled(after, seed)
    old, new = _metrics(before.sum(0)), _metrics(after.sum(0))
    drawn_old, drawn_new = _metrics(sums_before), _metrics(sums_after)
    return _estimates(
        {name: new[name] - old[name] for name in new},
        {name: drawn_new[name] - drawn_old[name] for name in new},
        names,
        len(before),
    )

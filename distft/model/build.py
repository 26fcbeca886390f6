"""The model as a job trains it: the one place where it is put together, for training and for export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distft.errors import JobError
from distft.model.load import load_classifier, load_model
from distft.model.nf4 import quantise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distft.config import Job


def training_model(
    job: Job, folder: Path, dtype: torch.dtype, labels: Sequence[str], pad_id: int, *, packed: bool = True
) -> PreTrainedModel:
    """The base model with what the job adds to it: a classifier's head, an adapter. Equal on every rank.

    Args:
        job: The job.
        folder: The base model's folder.
        dtype: Of the weights.
        labels: The labels' names in the order of their numbers; none where the task has none.
        pad_id: The token that fills short rows.
        packed: Whether a quantised base is kept in four bits; else the weights have the same values, and are plain.

    Raises:
        DataError: The model cannot be loaded, or is none for this task.
        JobError: The adapter does not fit it.
        CapacityError: It is to be quantised, and bitsandbytes is not installed here.
    """
    trust = job.model.trust_remote_code
    if job.task.kind == "classification":
        model = load_classifier(folder, dtype, labels=labels, seed=job.seed, pad_id=pad_id, trust_remote_code=trust)
    else:
        model = load_model(folder, dtype, trust_remote_code=trust)
    if job.model.adapter is not None:
        from distft.model.adapter import add_adapter  # peft takes a second to import

        if job.model.adapter.quantize is not None:
            quantise(model, packed=packed)
        add_adapter(model, job.model.adapter, job.seed)
    return model


def class_weights(job: Job, labels: Sequence[str], card: Mapping[str, Any]) -> list[float] | None:
    """The weight of each label in the loss; None where all weigh the same.

    Balanced weights are ``N / (K n)`` for a label of n of the N training rows, K labels having any: their mean over
    the training rows is 1, so losses and learning rates stay comparable (scikit-learn's ``class_weight="balanced"``;
    King and Zeng 2001, Logistic Regression in Rare Events Data).

    Args:
        job: The job.
        labels: The labels' names in the order of their numbers.
        card: The data card, which counts the training rows of each label.

    Raises:
        JobError: A weight is given for what is no label.
    """
    asked = job.task.class_weights
    if asked == "none":
        return None
    if isinstance(asked, str):
        counts: dict[str, int] = card["labels"]["rows"]["train"]
        present = [label for label in labels if counts.get(label, 0)]
        total = sum(counts[label] for label in present)
        return [total / (len(present) * counts[label]) if label in present else 1.0 for label in labels]
    if unknown := sorted(asked.keys() - set(labels)):
        raise JobError(
            f"{', '.join(unknown)}: no such label",
            where="task.class_weights",
            fix=f"the labels are {', '.join(labels)}; one without a weight has 1",
        )
    return [asked.get(label, 1.0) for label in labels]

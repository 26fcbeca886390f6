"""The model: its files, tokenizer, loss, FLOPs and generation.

The names are imported when first asked for, so that tokenising tasks, which need no torch, do not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.model.batch import IGNORED, Batch
    from distft.model.build import class_weights, training_model
    from distft.model.files import materialise
    from distft.model.flops import flops_per_token
    from distft.model.generation import Answer, answers, batches, context_of, generate
    from distft.model.load import DTYPES, load_classifier, load_model
    from distft.model.loss import LossModel
    from distft.model.tokenizer import end_of_text_id, load_tokenizer, pad_id, stop_ids, token_bytes

_HOMES = {
    "Answer": "generation",
    "answers": "generation",
    "batches": "generation",
    "DTYPES": "load",
    "IGNORED": "batch",
    "Batch": "batch",
    "LossModel": "loss",
    "class_weights": "build",
    "context_of": "generation",
    "end_of_text_id": "tokenizer",
    "flops_per_token": "flops",
    "generate": "generation",
    "load_classifier": "load",
    "load_model": "load",
    "load_tokenizer": "tokenizer",
    "materialise": "files",
    "pad_id": "tokenizer",
    "stop_ids": "tokenizer",
    "token_bytes": "tokenizer",
    "training_model": "build",
}

__all__ = [
    "DTYPES",
    "IGNORED",
    "Answer",
    "Batch",
    "LossModel",
    "answers",
    "batches",
    "class_weights",
    "context_of",
    "end_of_text_id",
    "flops_per_token",
    "generate",
    "load_classifier",
    "load_model",
    "load_tokenizer",
    "materialise",
    "pad_id",
    "stop_ids",
    "token_bytes",
    "training_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

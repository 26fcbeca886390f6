"""The model: its files, tokenizer, loss, FLOPs and generation.

The names are imported when first asked for, so that tokenising tasks, which need no torch, do not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.model.batch import IGNORED, Batch
    from distft.model.files import materialise
    from distft.model.flops import flops_per_token
    from distft.model.generation import generate
    from distft.model.load import DTYPES, load_model
    from distft.model.loss import LossModel
    from distft.model.tokenizer import end_of_text_id, load_tokenizer, pad_id, stop_ids, token_bytes

_HOMES = {
    "DTYPES": "load",
    "IGNORED": "batch",
    "Batch": "batch",
    "LossModel": "loss",
    "end_of_text_id": "tokenizer",
    "flops_per_token": "flops",
    "generate": "generation",
    "load_model": "load",
    "load_tokenizer": "tokenizer",
    "materialise": "files",
    "pad_id": "tokenizer",
    "stop_ids": "tokenizer",
    "token_bytes": "tokenizer",
}

__all__ = [
    "DTYPES",
    "IGNORED",
    "Batch",
    "LossModel",
    "end_of_text_id",
    "flops_per_token",
    "generate",
    "load_model",
    "load_tokenizer",
    "materialise",
    "pad_id",
    "stop_ids",
    "token_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

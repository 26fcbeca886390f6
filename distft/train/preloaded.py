"""What every rank imports, for processes that are to become ranks: torch, transformers, DeepSpeed and training."""

from __future__ import annotations

import transformers.models.llama.modeling_llama  # noqa: F401

import distft.train.worker  # noqa: F401
from distft import engine

engine.preload()

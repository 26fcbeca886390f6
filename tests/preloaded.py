"""What every rank of a test imports, imported once: ranks are forked from a process that has it (see ``support``)."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA, once started, does not survive a fork

from transformers import LlamaForCausalLM  # noqa: F401

from distft import engine
from distft.world import World

engine._prepare_deepspeed(World())

import distft.engine.zero  # noqa: E402
import distft.train.worker  # noqa: E402, F401

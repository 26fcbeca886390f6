"""Loading a model's weights for training or generation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import AutoModelForCausalLM

from distft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
"""The job file's names of number formats."""


def load_model(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder, on the CPU, in evaluation mode.

    Attention is transformers' default: torch's fused kernel (SDPA) where the architecture supports it.

    Args:
        folder: As :func:`distft.model.materialise` gives it.
        dtype: Of the weights.
        trust_remote_code: Whether Python code in the folder may run.

    Raises:
        DataError: It is no causal language model, or weights are missing (transformers would fill them with
            random numbers and only warn).
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the model cannot be loaded: {said[0]}", where=str(folder)) from error
    if missing := sorted(info["missing_keys"]):
        raise DataError(
            f"{len(missing)} weights are missing, {missing[0]} first",
            where=str(folder),
            fix="are all files of the model there, and does config.json belong to them?",
        )
    return model

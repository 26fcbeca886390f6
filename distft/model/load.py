"""Loading a model's weights for training, scoring or generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from distft.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
"""The job file's names of number formats."""

SCORE = "score.weight"
"""The name of the head's weight in every classifier that transformers makes of a GPT."""


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
    model, absent = _load(AutoModelForCausalLM, folder, dtype=dtype, trust_remote_code=trust_remote_code)
    _refuse_absent(absent, folder)
    return model


def load_classifier(
    folder: Path,
    dtype: torch.dtype,
    *,
    labels: Sequence[str] = (),
    seed: int = 0,
    pad_id: int | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A classifier of texts: a GPT whose head scores K labels from the state of a text's last token; on the CPU.

    A folder that is a classifier of these labels keeps its head. Any other model gets a fresh one, of normal numbers
    with the deviation of the model's ``initializer_range``, drawn from the seed: the same on every rank.

    Args:
        folder: Of a language model, or of a classifier (an export).
        dtype: Of the weights.
        labels: The labels' names in the order of their numbers; none: those of the folder, which must be a classifier.
        seed: Of a fresh head.
        pad_id: The token by which transformers' own forward finds the last token of a padded row; None: the folder's.
        trust_remote_code: Whether Python code in the folder may run.

    Raises:
        DataError: No classifier can be made of the model, or weights other than a fresh head's are missing.
    """
    config = _config(folder, trust_remote_code)
    own = [config.id2label[number] for number in range(config.num_labels)]
    if labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if pad_id is not None:
        config.get_text_config().pad_token_id = pad_id
    model, absent = _load(
        AutoModelForSequenceClassification,
        folder,
        dtype=dtype,
        config=config,
        ignore_mismatched_sizes=True,
        trust_remote_code=trust_remote_code,
    )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DataError(
            f"{type(model).__name__} has no head named score",
            where=str(folder),
            fix="classification takes a GPT-style model, such as Llama, Qwen, Gemma or GPT-2",
        )
    _refuse_absent(absent - {SCORE} if labels else absent, folder)
    if labels and (SCORE in absent or own != list(labels)):
        deviation = getattr(config.get_text_config(), "initializer_range", 0.02)
        draw = torch.Generator().manual_seed(seed)
        head.weight.data.copy_(torch.randn(head.weight.shape, generator=draw) * deviation)
    return model


def _config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise _unloadable(folder, error) from error


def _load(kind: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of weights that the folder lacks or has in another shape."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except (ValueError, OSError, RuntimeError) as error:
        raise _unloadable(folder, error) from error
    return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


def _unloadable(folder: Path, error: Exception) -> DataError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(f"the model cannot be loaded: {said[0]}", where=str(folder))


def _refuse_absent(names: set[str], folder: Path) -> None:
    if names:
        raise DataError(
            f"{len(names)} weights are missing, {min(names)} first",
            where=str(folder),
            fix="are all files of the model there, and does config.json belong to them?",
        )

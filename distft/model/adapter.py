"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: put into a model, merged into it, written as a folder.

They are injected in place, so the model stays the class that it is: names of modules, loss and engines see a model
of which most weights are frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from distft.errors import JobError
from distft.model.load import SCORE
from distft.model.nf4 import matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distft.config.sections import AdapterSection

ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."  # where a PeftModel holds the model that it wraps
_NAME = "default"  # of the one adapter


def add_adapter(model: PreTrainedModel, section: AdapterSection, seed: int) -> None:
    """Freezes the model and gives its matrices an adapter that does nothing yet: A is drawn, B is zero.

    The head of a classifier is trained in full beside it, since it begins from nothing.

    Args:
        model: On the CPU; changed in place.
        section: The job file's ``model.adapter``.
        seed: What A is drawn from; equal seeds give equal adapters, whatever was drawn before.

    Raises:
        JobError: A target is no matrix of the model.
    """
    dtype = model.dtype
    targets = _targets(model, section.targets)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=targets,
        lora_dropout=section.dropout,
        use_dora=section.dora,
        use_rslora=section.rslora,
        task_type=TaskType.SEQ_CLS if _classifies(model) else TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of GPT-2 that it takes note of its transposed matrices
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _NAME)
    for parameter in model.parameters():  # peft makes adapters of a bf16 model fp32; engines keep fp32 copies anyway
        if parameter.is_floating_point():  # quantised weights are not
            parameter.data = parameter.data.to(dtype)
    if _classifies(model):
        model.score.requires_grad_(True)


def merge_adapter(model: PreTrainedModel) -> None:
    """Adds the adapter to the weights that it adapts and takes it out: the model is plain again.

    The sum is made in the weights' own dtype: a bf16 model is better merged as fp32 and rounded once, after.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    del model.peft_config


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether there is one in the model, not merged."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The model as if its adapter were not there; what else was trained stays."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Writes the adapter, and a classifier's head, as a folder that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        model: With an adapter.
        folder: Is made where it is not there.
        base: Where users find the model that it belongs to.
    """
    config: Any = model.peft_config[_NAME]
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    if _classifies(model):
        config.modules_to_save = ["score"]
        weights[SCORE] = model.score.weight
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {_PREFIX + name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _classifies(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model, "score", None), nn.Linear)


def _targets(model: PreTrainedModel, asked: str | list[str]) -> str | list[str]:
    """What peft is to adapt.

    Raises:
        JobError: A name is that of no matrix, or of the output layer, whose weight may be the input embedding's too.
    """
    if asked == ALL_LINEAR:
        return ALL_LINEAR
    names = list(matrices(model))
    wanted = [asked] if isinstance(asked, str) else asked
    unknown = [one for one in wanted if not any(f".{name}".endswith(f".{one}") for name in names)]
    if unknown:
        there = sorted({name.rpartition(".")[2] for name in names})
        raise JobError(
            f"the model has no matrix to adapt named {', '.join(unknown)}",
            where="model.adapter.targets",
            fix=f"use {ALL_LINEAR}, or some of: {', '.join(there)}",
        )
    return wanted

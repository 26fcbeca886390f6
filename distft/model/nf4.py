"""Frozen matrices in four bits beneath an adapter (QLoRA, Dettmers et al., arXiv 2305.14314), through bitsandbytes.

Blocks of 64 weights share a scale, and each weight is one of 16 quantiles of a normal distribution (NF4, section 3).
The scales are rounded to 8 bits in their turn (double quantisation): 4.127 bits a weight. A pass computes with the
rounded weights in the model's own dtype, so a plain model of these same weights computes the same.
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distft.errors import CapacityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_absent() -> None:
    """Makes sure that there is something to quantise with.

    Raises:
        CapacityError: bitsandbytes is not installed here.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CapacityError(
            "quantisation needs bitsandbytes, which is not installed here",
            where="model.adapter.quantize",
            fix="pip install 'distft[gpu]' on every node, or set model.adapter.quantize: null",
        )


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of a model by name, without its head: what is adapted, and quantised."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and all(module is not head for head in heads)
    }


def quantise(model: PreTrainedModel, *, packed: bool) -> None:
    """Rounds a model's matrices to NF4, in place; embeddings, norms, biases and the head stay as they are.

    Args:
        model: On the CPU, where it is rounded whatever computes with it later: alike on all ranks, and at export.
        packed: Whether the matrices are kept in four bits; else they stay plain weights with the rounded values, to
            be merged with an adapter.

    Raises:
        CapacityError: bitsandbytes is not installed here.
    """
    refuse_absent()
    import bitsandbytes as bnb  # the extra "gpu"; seconds to import

    for name in list(matrices(model)):  # names alone: each matrix goes as soon as it is packed
        module = model.get_submodule(name)
        is_transposed = isinstance(module, Conv1D)  # GPT-2's
        weight: Tensor = module.weight.data
        values = weight.t().contiguous() if is_transposed else weight
        rows, columns = values.shape
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=weight.dtype, device="meta")
        layer.weight = bnb.nn.Params4bit(values, quant_type="nf4", module=layer).to("cpu")
        rounded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        _refuse_wrong(rounded, values, name)
        if not packed:
            weight.copy_(rounded.t() if is_transposed else rounded)
            continue
        layer.bias = module.bias
        # On a CPU with bf16 instructions a validation pass would repack the weights for its own kernels, for good.
        layer.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(module.training))
    model.is_loaded_in_4bit = packed  # by which peft knows the layers


def _refuse_wrong(rounded: Tensor, values: Tensor, name: str) -> None:
    """Makes sure that values were rounded, not mixed up.

    NF4's neighbours are at most 0.304 of a block's largest value apart. With AVX-512 bitsandbytes 0.50 takes wrong
    scales for rows that are no multiple of a block's 64 values.

    Raises:
        CapacityError: They were mixed up.
    """
    if (rounded - values).abs().max() > 0.2 * values.abs().max():
        raise CapacityError(
            f"bitsandbytes rounds {name}, of {values.shape[1]} columns, to wrong values on this processor",
            where="model.adapter.quantize",
            fix="train on a GPU, or set model.adapter.quantize: null",
        )


def elements(parameter: nn.Parameter) -> int:
    """The weights that a parameter stands for, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)

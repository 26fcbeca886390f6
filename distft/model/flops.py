"""What a token costs to train, in floating-point operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from distft.model.nf4 import elements

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def flops_per_token(model: PreTrainedModel, sequence_length: float) -> float:
    """FLOPs of forward and backward pass for one token: ``6 N + 4 F + 12 L H Q T``.

    PaLM (arXiv 2204.02311), appendix B: N trained parameters take part in one multiplication and one addition each,
    forward once and backward twice, for the gradient by their input and the gradient by themselves (Kaplan et al.,
    arXiv 2001.08361, section 2.1); F frozen ones beside an adapter are spared the latter. Attention of L layers with
    H heads of size Q over T tokens adds 12 L H Q T. Recomputing activations is not counted, nor is the half that
    causality saves, as in PaLM's model FLOPs utilisation (MFU).

    Args:
        model: Tied parameters count once. An embedding that is not the output layer too is only looked up, so it
            counts as nothing.
        sequence_length: Tokens T that a token's attention reaches over (rows with several segments: their mean).
    """
    head = model.get_output_embeddings()
    output = None if head is None else head.weight
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not output
    }
    multiplied = [parameter for parameter in model.parameters() if id(parameter) not in looked_up]
    weights = sum((6 if parameter.requires_grad else 4) * elements(parameter) for parameter in multiplied)
    text = model.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 12 * text.num_hidden_layers * text.num_attention_heads * head_size * sequence_length
    return float(weights + attention)

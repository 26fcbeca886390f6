"""What a token costs to train, in floating-point operations."""

from __future__ import annotations

from typing import Any


def flops_per_token(config: Any, parameters: int, sequence_length: float) -> float:
    """FLOPs of forward and backward pass for one token: ``6 N + 12 L H Q T``.

    PaLM (arXiv 2204.02311), appendix B: N parameters take part in one multiplication and one addition each, forward
    once and backward twice (Kaplan et al., arXiv 2001.08361, section 2.1); attention of L layers with H heads of
    size Q over T tokens adds 12 L H Q T. Recomputing activations is not counted, nor is the half that causality
    saves, as in PaLM's model FLOPs utilisation (MFU).

    Args:
        config: A transformers configuration.
        parameters: Parameters of the model, tied ones once. An input embedding that is not tied to the output
            layer is only looked up, so it is left out of N.
        sequence_length: Tokens T that a token's attention reaches over (rows with several segments: their mean).
    """
    text = config.get_text_config()
    lookups = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 12 * text.num_hidden_layers * text.num_attention_heads * head_size * sequence_length
    return float(6 * (parameters - lookups) + attention)

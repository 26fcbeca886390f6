"""Small random models and tokenizers of the shapes that real ones have."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WHY_NO_NF4 = (
    "bitsandbytes is not installed (the extras gpu and dev)"
    if importlib.util.find_spec("bitsandbytes") is None
    else "with AVX-512 bitsandbytes rounds rows of 32 columns to wrong values, which is refused"
    if torch.backends.cpu.get_cpu_capability() == "AVX512"
    else None
)
needs_bitsandbytes = pytest.mark.skipif(WHY_NO_NF4 is not None, reason=str(WHY_NO_NF4))
VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {**SHAPE, "head_dim": 8, "sliding_window": 4}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**WINDOWED, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **WINDOWED, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
}


def tokenizer(special: list[str], *, template: str | None = None, **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; the special tokens get the first ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    made.chat_template = template
    return made


SMOLLM2 = {
    "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "template": "<|im_start|>{{ m }}<|im_end|>",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}

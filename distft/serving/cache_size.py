"""How much of a device's memory the keys and values of answers in progress take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from distft.errors import CapacityError

#: The share of a device's free memory that is taken; a CPU's is other programs' too, and the next replica's.
_SHARE = {"cpu": 0.2, "cuda": 0.8}
#: The most tokens of one forward pass: a long prompt is read in pieces, while other answers go on.
_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
_PAGE_TOKENS = 32
_VLLM_PAGE_TOKENS = 128


@dataclass(frozen=True)
class CacheSize:
    """The sizes that transformers' continuous batching is given.

    Attributes:
        blocks: Of keys and values, each of ``page_tokens`` tokens in all layers.
        page_tokens: Tokens in a block.
        batch_tokens: The most tokens of one forward pass, of prompts and answers together.
    """

    blocks: int
    page_tokens: int
    batch_tokens: int


def free_memory(device: torch.device) -> int:
    """Bytes that keys and values may take on a device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free * _SHARE.get(device.type, 0.2))


def cache_size(
    config: Any, dtype: torch.dtype, device: torch.device, context: int, concurrent: int, memory_bytes: int
) -> CacheSize:
    """Room for so many answers as long as the context; for fewer, or shorter ones, where memory ends before.

    Answers that do not fit are set back and written on later.

    Args:
        config: Of the model's text part, as transformers has it.
        dtype: Of keys and values.
        device: Where they are.
        context: Tokens of an answer and its prompt at most.
        concurrent: Answers at the same time.
        memory_bytes: What they may take.

    Raises:
        CapacityError: Not even one whole context fits.
    """
    batch_tokens = max(_BATCH_TOKENS.get(device.type, 256), concurrent)
    heads, kept, width = _shape(config, dtype)
    masks = 1 if getattr(config, "sliding_window", None) is None else 2
    token_bytes = (
        2 * kept * width * config.num_hidden_layers
        + (2 * heads + kept) * width  # one layer's, read back and repeated for each head
        + masks * batch_tokens * dtype.itemsize  # every token of a batch has its mask over all tokens
        + 8  # and its place
    )
    whole = math.ceil(context / _PAGE_TOKENS)
    blocks = min(whole * concurrent, memory_bytes // (token_bytes * _PAGE_TOKENS))
    if blocks < whole:
        raise _too_small(context, whole * _PAGE_TOKENS * token_bytes, memory_bytes, device.type)
    return CacheSize(blocks, _PAGE_TOKENS, batch_tokens)


def vllm_bytes(config: Any, dtype: torch.dtype, context: int, concurrent: int, memory_bytes: int) -> int:
    """What vLLM's keys and values take on a CPU, for answers as long as the context; arguments as above.

    Its pages are of 128 tokens there, and one of them is never used.

    Raises:
        CapacityError: Not even one whole context fits.
    """
    _, kept, width = _shape(config, dtype)
    page_bytes: int = _VLLM_PAGE_TOKENS * 2 * kept * width * config.num_hidden_layers
    whole = math.ceil(context / _VLLM_PAGE_TOKENS)
    needed = (whole + 1) * page_bytes
    if memory_bytes < needed:
        raise _too_small(context, needed, memory_bytes, "cpu")
    return min((whole * concurrent + 1) * page_bytes, memory_bytes)


def _shape(config: Any, dtype: torch.dtype) -> tuple[int, int, int]:
    """Heads that ask, heads that are kept, and bytes of one head's key."""
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * dtype.itemsize
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def _too_small(context: int, needed: int, memory_bytes: int, where: str) -> CapacityError:
    return CapacityError(
        f"an answer of {context:,} tokens needs {needed / 2**30:.2f} GiB of keys and values; there are "
        f"{memory_bytes / 2**30:.2f} GiB",
        where=where,
        fix="allow a shorter context, or take a larger device",
    )

"""Rows that several ranks share, each with a run of their tokens: DeepSpeed-Ulysses (arXiv 2309.14509, section 3).

All but attention looks at one token alone. For attention the ranks of a group exchange: each gets all tokens for its
share of the heads, and gives back the result for its own tokens. The exchange is DeepSpeed's for transformers'
attention interface (ALST, arXiv 2506.13996; ``runtime/sequence_parallel/ulysses_sp.py``). It knows no masks, so the
attention that it calls must read where texts begin from the positions: :mod:`distft.model.segments` does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distft.errors import JobError
from distft.model import Batch, LossModel
from distft.model.segments import NAME as BY_SEGMENTS
from distft.world import World

#: This attention's name in transformers.
NAME = "distft_ulysses"

_KEY = "train.sequence_parallel_size"
_FIX = f"remove {_KEY}; train.activation_checkpointing: true and zero.stage: 3 save memory too"


class SharedRows:
    """The group of ranks that share this rank's rows, and the exchange between them.

    Args:
        model: Its attention is replaced.
        size: Ranks of a group; they follow one another.
        world: This rank's place.

    Raises:
        JobError: The model's layers need more than the positions to attend alike, or draw dropout.
    """

    def __init__(self, model: LossModel, size: int, world: World) -> None:
        if not model.by_segments or _needs_masks(model):
            what = "attention of this model needs more than positions (a window, say), which ranks cannot share"
            raise JobError(what, where=_KEY, fix=_FIX)
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
            raise JobError("dropout would draw other numbers where rows are shared", where=_KEY, fix="set it to 0")
        self._size, self._index = size, world.rank % size
        for first in range(0, world.size, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= world.rank < first + size:
                self._group = group
        self._exchange = functools.cache(self._made)
        AttentionInterface.register(NAME, self._attend)

    def part(self, batch: Batch) -> Batch:
        """This rank's columns of a batch, equally many on each rank: (B, T / S), T rounded up."""
        return batch.columns(self._index, self._size)

    def whole(self, part: Tensor, tokens: int) -> Tensor:
        """What the ranks of the group have of a tensor, (B, T / S) on each, together: (B, T)."""
        parts = [torch.empty_like(part) for _ in range(self._size)]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)[:, :tokens]

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group(self._group)

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **rest: Any
    ) -> tuple[Tensor, None]:
        """Attention as transformers calls it; (B, T / S, H, Q) of all heads."""
        rows, heads, _, size = query.shape
        exchange = self._exchange(rows, heads, key.shape[1], size)
        found: tuple[Tensor, None] = exchange(module, query, key, value, attention_mask, **rest)
        return found

    def _made(self, rows: int, heads: int, kv_heads: int, size: int) -> UlyssesSPAttentionHF:
        """DeepSpeed's exchange for a shape of batch."""
        return UlyssesSPAttentionHF(
            attn=ALL_ATTENTION_FUNCTIONS[BY_SEGMENTS],
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=size,
            kv_head_count=kv_heads,
            num_hidden_layers=1,  # for debugging alone
            process_group=self._group,
            seq_length_is_variable=True,
        )


@torch.no_grad()
def _needs_masks(model: LossModel) -> bool:
    """Whether a layer is given a mask, or values of another size than its keys: found by passing eight tokens."""
    attend = ALL_ATTENTION_FUNCTIONS[BY_SEGMENTS]
    found: list[bool] = []

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        found.append(mask is not None or key.shape != value.shape)
        return attend(module, query, key, value, mask, **rest)

    AttentionInterface.register(NAME, watch)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[BY_SEGMENTS])
    model.model.set_attn_implementation(NAME)
    tokens = torch.arange(8, device=model.model.device)[None]
    model.model.base_model(input_ids=tokens, position_ids=tokens, use_cache=False)
    return not found or any(found)

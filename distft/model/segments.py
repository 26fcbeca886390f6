"""Attention in packed rows, text by text: a row costs what its texts cost, not what a square mask does.

transformers keeps the texts of a packed row apart by a mask of T x T, and torch's fused kernel then computes the whole
square, of which eight equal texts need a sixteenth. On CPUs torch has no kernel for texts of several lengths
(``torch.nn.attention.varlen`` is CUDA's; flex attention has no backward pass there), so its causal kernel is called for
each text by itself, as FlashAttention (arXiv 2307.08691) does in one call of its ``flash_attn_varlen_func``. On other
devices the mask stays.

Shapes: B rows, T tokens, H heads, K heads of keys and values, Q the size of one. Where texts begin is read from the
positions, (B, T), as transformers does: wherever one does not follow the one before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "distft_segments"
"""This attention's name in transformers."""
SHORT = 256
"""Tokens up to which a text's backward pass is faster in fp32 than in bf16: of 128 tokens twice (torch 2.13)."""


def attend_by_segments(model: PreTrainedModel) -> bool:
    """Has a model compute attention text by text on CPUs, where that is the same; says whether it does.

    It is the same wherever layers get the positions and use transformers' attention interface. That is found by trying,
    not by a list of names: with it a text's states must be what they are with a mask, but for rounding, and equal to
    the last bit whatever text stands before it. Layers with a window keep their masks.

    Args:
        model: On the CPU. Three rows of eight tokens are passed through it.
    """
    if torch.cuda.is_available() or model.config._attn_implementation not in ("sdpa", NAME) or _dropout(model):
        return False
    if model.base_model is model or not model._can_set_attn_implementation():
        return False
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(8)[None] % size
    other = torch.cat([(ids[:, :4] + 5) % size, ids[:, 4:]], dim=1)
    positions = (torch.arange(8) % 4)[None]

    @torch.no_grad()
    def states(ids: Tensor) -> Tensor:
        found: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return found

    training = model.training
    model.eval()
    masked = states(ids)
    model.set_attn_implementation(NAME)
    ours, isolated = states(ids), states(other)
    model.train(training)
    same = torch.allclose(ours, masked, rtol=0, atol=0.02 * float(masked.abs().max()))
    if not same or not torch.equal(ours[:, 4:], isolated[:, 4:]):
        model.set_attn_implementation("sdpa")
        return False
    return True


def _dropout(model: PreTrainedModel) -> float:
    """Of attention's weights, which the kernel knows nothing of; in the names of Llama's and of GPT-2's kind."""
    text = model.config.get_text_config()
    return max(float(getattr(text, name, None) or 0) for name in ("attention_dropout", "attn_pdrop"))


def _mask(
    *, attention_mask: Tensor | None = None, device: torch.device, local_size: int | None = None, **rest: Any
) -> Tensor | None:
    """The mask of SDPA; none where the positions say all: whole rows on a CPU, without padding, cache or window."""
    whole = attention_mask is None and rest["q_length"] == rest["kv_length"]
    if whole and torch.device(device).type == "cpu" and local_size is None and not rest.get("use_vmap"):
        return None
    made: Tensor | None = sdpa_mask(attention_mask=attention_mask, device=device, local_size=local_size, **rest)
    return made


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; (B, T, H, Q)."""
    # A token that goes on from a cache has no mask either.
    whole = attention_mask is None and query.shape[2] == key.shape[2]
    usual = query.device.type != "cpu" or query.shape[3] != value.shape[3]
    if not whole or usual or position_ids is None or position_ids.ndim != 2:
        rest.update(scaling=scaling, position_ids=position_ids)
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        return found
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    states, _ = _forward(query, key, value, position_ids.expand(len(query), -1), scale)
    return states.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _texts(positions: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows and tokens of each text; all rows at once where each is a single text."""
    breaks = positions[:, 1:] != positions[:, :-1] + 1
    if not breaks.any():
        yield slice(None), slice(None)
        return
    for row, ends in enumerate(breaks):
        bounds = [0, *(ends.nonzero().flatten() + 1).tolist(), positions.shape[1]]
        for begin, end in itertools.pairwise(bounds):
            yield slice(row, row + 1), slice(begin, end)


def _repeated(each: Tensor, query: Tensor) -> Tensor:
    """Keys or values, (B, K, T, Q), with a head for each of the queries', (B, H, T, Q)."""
    wide: Tensor = repeat_kv(each, query.shape[1] // each.shape[1])
    return wide


def _by_token(like: Tensor) -> Tensor:
    """Room for (B, H, T, Q) that lies in memory as (B, T, H, Q), as the layers want it."""
    rows, heads, tokens, size = like.shape
    return like.new_empty(rows, tokens, heads, size).transpose(1, 2)


def _room(query: Tensor) -> tuple[Tensor, Tensor]:
    """For the result, (B, H, T, Q), and the logarithm of each token's sum of exponentials, (B, H, T)."""
    sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return _by_token(query), sums


# Operators of their own, so that torch.compile takes them as they are: how a row is cut would else be compiled into it.
@torch.library.custom_op("distft::segment_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What there is room for in :func:`_room`; keys and values, (B, K, T, Q), are repeated for a text at a time."""
    found, sums = _room(query)
    for rows, tokens in _texts(positions):
        part = query[rows, :, tokens], *(_repeated(each[rows, :, tokens], query) for each in (key, value))
        found[rows, :, tokens], sums[rows, :, tokens] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part, 0.0, True, scale=scale
        )
    return found, sums


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _room(query)


@torch.library.custom_op("distft::segment_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    found: Tensor,
    sums: Tensor,
    positions: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value."""
    gradients = _by_token(query), _by_token(key), _by_token(value)
    for rows, tokens in _texts(positions):
        part = [each[rows, :, tokens] for each in (gradient, query, key, value, found, sums)]
        part[2:4] = (_repeated(each, query) for each in part[2:4])
        if part[0].shape[2] <= SHORT:
            part = [each.to(sums.dtype) for each in part]
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*part, 0.0, True, scale=scale)
        for whole, one in zip(gradients, parts, strict=True):
            whole[rows, :, tokens] = one.unflatten(1, (whole.shape[1], -1)).sum(dim=2)
    return gradients


@_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    found: Tensor,
    sums: Tensor,
    positions: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(query), _by_token(key), _by_token(value)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, positions, found, sums = ctx.saved_tensors
    return *_backward(gradient, query, key, value, found, sums, positions, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)

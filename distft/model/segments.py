"""Attention in packed rows, text by text: a row costs what its texts cost, not what a square mask does.

transformers keeps the texts of a packed row apart by a mask of T x T, and torch's fused kernel then computes the whole
square, of which eight equal texts need a sixteenth. On GPUs torch's FlashAttention (arXiv 2307.08691) takes texts of
several lengths laid end to end, in bf16 and fp16: the kernel of ``torch.nn.attention.varlen``. On CPUs torch has none
(flex attention has no backward pass there), so its causal kernel is called for each text by itself. Elsewhere, and in
fp32 on GPUs, the mask stays.

Shapes: B rows, T tokens, H heads, K heads of keys and values, Q the size of one. Where texts begin is read from the
positions, (B, T), as transformers does: wherever one does not follow the one before it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "distft_segments"
"""This attention's name in transformers."""
FLASH_SIZE, FLASH_DTYPES = 256, (torch.bfloat16, torch.float16)
"""The largest head that FlashAttention takes on GPUs, and the types."""
DEVICES = ("cpu", "cuda")
"""Those that have a kernel for it."""
SHORT = 256
"""Tokens up to which a text's backward pass is faster in fp32 than in bf16: of 128 tokens twice (torch 2.13)."""


def attend_by_segments(model: PreTrainedModel) -> bool:
    """Has a model compute attention text by text, where that is the same; says whether it does.

    It is the same wherever layers get the positions and use transformers' attention interface. That is found by trying,
    not by a list of names: with it a text's states must be what they are with a mask, but for rounding, and equal to
    the last bit whatever text stands before it. Layers with a window keep their masks. On a GPU its kernel is tried
    too, which old ones have not.

    Args:
        model: On the device it is on while it is made. Three rows of eight tokens are passed through it.
    """
    if model.config._attn_implementation not in ("sdpa", NAME) or _dropout(model):
        return False
    if model.base_model is model or not model._can_set_attn_implementation():
        return False
    if torch.cuda.is_available() and model.dtype in FLASH_DTYPES and not _kernel_works("cuda", *_heads(model)):
        return False
    embeddings = model.get_input_embeddings()
    size = embeddings.num_embeddings
    ids = torch.arange(8, device=embeddings.weight.device)[None] % size
    other = torch.cat([(ids[:, :4] + 5) % size, ids[:, 4:]], dim=1)
    positions = (torch.arange(8, device=ids.device) % 4)[None]

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


def _heads(model: PreTrainedModel) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the size of one."""
    text = model.config.get_text_config()
    heads = int(text.num_attention_heads)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, int(getattr(text, "num_key_value_heads", None) or heads), int(size)


@functools.cache
def _kernel_works(device: str, heads: int, kv_heads: int, size: int) -> bool:
    """Whether attention by texts gives on a device what a mask gives, in bf16, forwards and backwards: it is tried."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(2, each, 12, size) for each in (heads, kv_heads, kv_heads, heads)]
    *given, gradient = (torch.randn(shape, generator=draw).to(device, torch.bfloat16) for shape in shapes)
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]], device=device)

    def by_texts(*given: Tensor) -> Tensor:
        states: Tensor = _forward(*given, positions, size**-0.5)[0]
        return states

    def with_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        wide = _repeated(key, query), _repeated(value, query)
        return F.scaled_dot_product_attention(query, *wide, attn_mask=_apart(positions))

    found = []
    for attend in (by_texts, with_mask):
        leaves = [each.clone().requires_grad_() for each in given]
        try:
            states = attend(*leaves)
            found.append([states.detach(), *torch.autograd.grad(states, leaves, gradient)])
        except RuntimeError:  # the device is too old, or torch was built without
            return False
    pairs = zip(*found, strict=True)
    return all(torch.allclose(one, other, rtol=0, atol=0.02 * float(other.abs().max())) for one, other in pairs)


def _takes(query: Tensor, value: Tensor) -> bool:
    """Whether the device's kernel takes heads like these: a model may have some of another size or type."""
    fits = not query.is_cuda or (query.shape[3] <= FLASH_SIZE and query.dtype in FLASH_DTYPES)
    return fits and query.shape[3] == value.shape[3]


def _mask(
    *, attention_mask: Tensor | None = None, device: torch.device, local_size: int | None = None, **rest: Any
) -> Tensor | None:
    """The mask of SDPA; none where the positions say all: whole rows without padding, cache or window."""
    whole = attention_mask is None and rest["q_length"] == rest["kv_length"]
    if whole and torch.device(device).type in DEVICES and local_size is None and not rest.get("use_vmap"):
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
    if whole and position_ids is not None and position_ids.ndim == 2:
        if _takes(query, value):
            scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
            states, _ = _forward(query, key, value, position_ids, scale)
            return states.transpose(1, 2), None
        if query.is_cuda:
            attention_mask = _apart(position_ids)
    rest.update(scaling=scaling, position_ids=position_ids)
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    return found


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _breaks(positions: Tensor) -> Tensor:
    """Whether a text ends with a token, (B, T - 1): all but each row's last."""
    return positions[:, 1:] != positions[:, :-1] + 1


@functools.lru_cache(maxsize=1)
def _apart(positions: Tensor) -> Tensor | None:
    """The mask that keeps texts apart, (B, 1, T, T): True where a token attends. None where each row is one text.

    It waits for the device, so it is made once for all layers of a pass, which get the same tensor.
    """
    breaks = _breaks(positions)
    if not breaks.any():
        return None
    texts = F.pad(breaks.cumsum(dim=1), (1, 0))
    return (texts[:, None, :, None] == texts[:, None, None, :]).tril()


def _texts(positions: Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
    """The rows and tokens of each text; all rows at once where each is a single text."""
    breaks = _breaks(positions)
    if not breaks.any():
        yield slice(None), slice(None)
        return
    for row, ends in enumerate(breaks.expand(rows, -1)):
        bounds = [0, *(ends.nonzero().flatten() + 1).tolist(), positions.shape[1]]
        for begin, end in itertools.pairwise(bounds):
            yield slice(row, row + 1), slice(begin, end)


@functools.lru_cache(maxsize=1)
def _bounds(positions: Tensor, rows: int) -> tuple[Tensor, int]:
    """Where texts begin in rows laid end to end, and their end, (texts + 1,) int32; the longest one's tokens.

    Found once a pass, as the mask is.
    """
    begins = F.pad(_breaks(positions), (1, 0), value=True).expand(rows, -1).flatten().nonzero().flatten()
    bounds = F.pad(begins, (0, 1), value=rows * positions.shape[1])
    return bounds.int(), int(bounds.diff().max())


def _repeated(each: Tensor, query: Tensor) -> Tensor:
    """Keys or values, (B, K, T, Q), with a head for each of the queries', (B, H, T, Q)."""
    wide: Tensor = repeat_kv(each, query.shape[1] // each.shape[1])
    return wide


def _by_token(like: Tensor) -> Tensor:
    """Room for (B, H, T, Q) that lies in memory as (B, T, H, Q), as the layers want it."""
    rows, heads, tokens, size = like.shape
    return like.new_empty(rows, tokens, heads, size).transpose(1, 2)


def _laid_end_to_end(each: Tensor) -> Tensor:
    """(B, H, T, Q) as (B T, H, Q)."""
    return each.transpose(1, 2).flatten(0, 1).contiguous()


def _in_rows(flat: Tensor, like: Tensor) -> Tensor:
    """(B T, H, Q) as (B, H, T, Q)."""
    return flat.view(len(like), -1, *flat.shape[1:]).transpose(1, 2)


def _room(query: Tensor) -> tuple[Tensor, Tensor]:
    """For the result, (B, H, T, Q), and the logarithm of each token's sum of exponentials, (B, H, T)."""
    sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return _by_token(query), sums


# Operators of their own, so that torch.compile takes them as they are: how a row is cut would else be compiled into it.
@torch.library.custom_op("distft::segment_attention", mutates_args=(), device_types="cpu")
def _forward(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What there is room for in :func:`_room`; keys and values, (B, K, T, Q), are repeated for a text at a time."""
    found, sums = _room(query)
    for rows, tokens in _texts(positions, len(query)):
        part = query[rows, :, tokens], *(_repeated(each[rows, :, tokens], query) for each in (key, value))
        found[rows, :, tokens], sums[rows, :, tokens] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part, 0.0, True, scale=scale
        )
    return found, sums


@_forward.register_kernel("cuda")
def _flash(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same in one call for all texts."""
    bounds, longest = _bounds(positions, len(query))
    flat = map(_laid_end_to_end, (query, key, value))
    found, sums, *_ = torch.ops.aten._flash_attention_forward(
        *flat, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return _in_rows(found, query), sums.view(len(sums), len(query), -1).transpose(0, 1).contiguous()


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _room(query)


@torch.library.custom_op("distft::segment_attention_backward", mutates_args=(), device_types="cpu")
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
    for rows, tokens in _texts(positions, len(query)):
        part = [each[rows, :, tokens] for each in (gradient, query, key, value, found, sums)]
        part[2:4] = (_repeated(each, query) for each in part[2:4])
        if part[0].shape[2] <= SHORT:
            part = [each.to(sums.dtype) for each in part]
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*part, 0.0, True, scale=scale)
        for whole, one in zip(gradients, parts, strict=True):
            whole[rows, :, tokens] = one.unflatten(1, (whole.shape[1], -1)).sum(dim=2)
    return gradients


@contextmanager
def _deterministic() -> Iterator[None]:
    """Has torch's kernels add in the same order each time, which costs some speed: the same digits are promised."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@_backward.register_kernel("cuda")
def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    found: Tensor,
    sums: Tensor,
    positions: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds, longest = _bounds(positions, len(query))
    flat = map(_laid_end_to_end, (gradient, query, key, value, found))
    no_dropout = query.new_zeros(2, dtype=torch.uint64), query.new_empty(0)
    sums = sums.transpose(0, 1).flatten(1).contiguous()
    with _deterministic():
        one, other, third = torch.ops.aten._flash_attention_backward(
            *flat, sums, bounds, bounds, longest, longest, 0.0, True, *no_dropout, scale=scale
        )
    return _in_rows(one, query), _in_rows(other, query), _in_rows(third, query)


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

"""Attention text by text: what the mask gives, without the mask, for whatever model it is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

from distft.model import Batch, LossModel, segments

from .test_model_loss import MIXED, batch_of, gradients, pack, segment, tiny
from .tiny_models import CONFIGS, SHAPE

LONG = batch_of(
    pack(segment(segments.SHORT + 20, 1), segment(30, 2), segment(5, 3)),
    pack(segment(40, 4), segment(1, 5), segment(segments.SHORT + 14, 6)),
)
#: Caps its attention, which torch's kernel cannot: transformers gives it none of torch's.
CAPPED = "gemma2"
SIZES = 2, 4, 2, 12, 8
"""Rows, heads, heads of keys and values, tokens, the size of a head."""
POSITIONS = torch.tensor([[*range(5), *range(7)], [*range(12)]])
WHERE = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def queries_keys_values(**kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As layers have them: laid out by token."""
    rows, heads, kv_heads, tokens, size = SIZES
    query, key, value = (
        torch.randn(rows, tokens, each, size, **kind).transpose(1, 2) for each in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def with_mask(model: LossModel) -> LossModel:
    """The same model, with transformers' own attention."""
    masked = copy.deepcopy(model)
    masked.model.set_attn_implementation("sdpa")
    return masked


def losses_and_gradients(model: LossModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    _, rows = model(batch)
    model(batch)[0].backward()
    return rows, gradients(model)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != CAPPED])
def test_losses_and_gradients_are_those_of_the_mask(name: str) -> None:
    model = LossModel(tiny(name, torch.float64))
    assert model.by_segments
    ours, expected = (losses_and_gradients(each, MIXED) for each in (model, with_mask(model)))
    torch.testing.assert_close(ours, expected)


def test_a_model_without_torchs_kernel_keeps_its_attention() -> None:
    assert not LossModel(tiny(CAPPED)).by_segments


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_and_short_texts_are_as_exact_as_with_the_mask(dtype: torch.dtype, device: str) -> None:
    """Their backward passes differ in type: either must be as near to fp64 as the mask's."""
    exact = LossModel(transformers.LlamaForCausalLM(CONFIGS["llama"]()).double())
    model = LossModel(copy.deepcopy(exact.model).to(dtype)).to(device)
    assert model.by_segments
    _, expected = losses_and_gradients(exact, LONG)
    errors = []
    for each in (model, with_mask(model)):
        _, found = losses_and_gradients(each, LONG.to(device))
        errors.append(
            sum(float((found[name].cpu() - expected[name]).norm() / expected[name].norm()) for name in expected)
        )
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("device", WHERE)
def test_gradients_have_the_same_digits_each_time(device: str) -> None:
    """Kernels of GPUs add in any order unless they are told not to."""
    model = LossModel(tiny("llama", torch.bfloat16)).to(device)
    once, again = (losses_and_gradients(copy.deepcopy(model), LONG.to(device)) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


def test_heads_that_the_kernel_cannot_take_keep_the_mask() -> None:
    """DeepSeek's kind, whose queries are larger than its values."""
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4}, **sizes, first_k_dense_replace=2, n_routed_experts=4, n_group=1
    )
    assert not LossModel(transformers.DeepseekV3ForCausalLM(config)).by_segments


def test_a_kernel_that_does_not_keep_texts_apart_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert segments._kernel_works.__wrapped__("cpu", 4, 2, 16)
    monkeypatch.setattr(segments, "_texts", lambda *_: iter([(slice(None), slice(None))]))
    assert not segments._kernel_works.__wrapped__("cpu", 4, 2, 16)


def by_definition(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What torch's FlashAttention is to give for texts laid end to end, (T, H, Q): states, and sums' logarithms."""
    states, sums = [], []
    for begin, end in itertools.pairwise(begins.tolist()):
        keys, values = (each[begin:end].repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], keys) * scale
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        sums.append(scores.logsumexp(2))
        states.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), values))
    return torch.cat(states), torch.cat(sums, 1)


def test_what_gpus_are_asked_is_what_cpus_are() -> None:
    """Torch's kernel is for GPUs alone; here it is what its definition says, in its own shapes."""

    def forward(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, *rest: Any, scale: float) -> tuple[Any, ...]:
        assert rest[1:] == (12, 12, 0.0, True, False)
        return *by_definition(query, key, value, begins, scale), *query.new_empty(3)

    def backward(*given: Any, scale: float) -> tuple[Tensor, ...]:
        with ThreadPoolExecutor(1) as elsewhere:  # within an operator nothing can be differentiated
            return elsewhere.submit(differentiate, *given, scale=scale).result()

    def differentiate(gradient: Tensor, *given: Any, scale: float) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in given[:3]]
        states, sums = by_definition(*leaves, given[5], scale)
        torch.testing.assert_close((states.detach(), sums.detach()), given[3:5])
        assert given[7:11] == (12, 12, 0.0, True)
        assert torch.are_deterministic_algorithms_enabled()
        return torch.autograd.grad(states, leaves, gradient)

    given = queries_keys_values(dtype=torch.float64)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        found = segments._flash(*given, POSITIONS, 0.3)
        expected = segments._forward(*given, POSITIONS, 0.3)
        torch.testing.assert_close(found, expected)
        gradient = torch.randn_like(expected[0])
        more = segments._flash_backward(gradient, *given, *found, POSITIONS, 0.3)
    torch.testing.assert_close(more, segments._backward(gradient, *given, *expected, POSITIONS, 0.3))
    assert not torch.are_deterministic_algorithms_enabled()


def test_gpus_give_what_compiled_layers_are_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own account of its kernel: sizes, types and where they lie in memory."""
    given = queries_keys_values(dtype=torch.bfloat16, device="meta")
    positions = POSITIONS.to("meta")
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    monkeypatch.setattr(segments, "_bounds", lambda *_: (bounds, 12))
    promised, found = (attend(*given, positions, 0.3) for attend in (segments._forward, segments._flash))
    gradients = segments._flash_backward(found[0], *given, *found, positions, 0.3)
    promised += segments._backward(found[0], *given, *promised, positions, 0.3)
    for one, other in zip((*found, *gradients), promised, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_no_mask_is_made_and_each_text_is_attended_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_mask(**_: Any) -> None:
        raise AssertionError("a mask of T x T was made")

    model = LossModel(tiny("llama"))
    cut: list[int] = []
    texts = segments._texts

    def spy(positions: Tensor, rows: int) -> Iterator[tuple[slice, slice]]:
        found = list(texts(positions, rows))
        cut.append(len(found))
        return iter(found)

    monkeypatch.setattr(segments, "sdpa_mask", no_mask)
    monkeypatch.setattr(segments, "_texts", spy)
    model(batch_of(pack(segment(8, 1)), pack(segment(8, 2))))
    assert cut == [1, 1]  # both layers take rows that are one text each at once
    cut.clear()
    model(batch_of(pack(segment(4, 1), segment(4, 2)), pack(segment(8, 2))))
    assert cut == [3, 3]


def test_a_window_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's kind: of two layers one has a window, and that one alone gets a mask."""
    model = LossModel(tiny("gemma3"))
    kept = segments.sdpa_mask
    windows: list[int | None] = []

    def spy(**arguments: Any) -> Tensor | None:
        windows.append(arguments["local_size"])
        return kept(**arguments)

    monkeypatch.setattr(segments, "sdpa_mask", spy)
    model(MIXED)
    assert windows == [4]


def test_layers_that_do_not_hear_of_positions_keep_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = transformers.models.llama.modeling_llama.LlamaAttention.forward

    def deaf(self: Any, *arguments: Any, position_ids: Tensor | None = None, **rest: Any) -> Any:
        return forward(self, *arguments, **rest)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", deaf)
    model = LossModel(tiny("llama"))
    assert not model.by_segments
    assert model.model.config._attn_implementation == "sdpa"
    first, other, second = segment(9, 1), segment(9, 3), segment(7, 2)
    kept = [model.token_losses(batch_of(pack(each, second)))[0, 9:] for each in (first, other)]
    assert torch.equal(*kept)


def test_dropout_in_attention_keeps_the_mask() -> None:
    config = CONFIGS["llama"]()
    config.attention_dropout = 0.1
    assert not LossModel(transformers.LlamaForCausalLM(config)).by_segments


@pytest.mark.parametrize("padded", [0, 4])
def test_padding_and_a_cache_are_as_without_it(padded: int) -> None:
    """The model may be asked for text afterwards: with padding on the left, and token by token."""
    plain = tiny("llama").eval()
    ours = LossModel(copy.deepcopy(plain)).model.eval()
    ids = torch.tensor([segment(9, 1).tolist(), segment(9, 2).tolist()])
    padding = torch.ones_like(ids)
    padding[0, :padded] = 0
    asked: dict[str, Any] = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, padding).logits, plain(ids, padding).logits)
        scores = [
            torch.stack(model.generate(**asked, output_scores=True, return_dict_in_generate=True).scores)
            for model in (ours, plain)
        ]
    torch.testing.assert_close(*scores)


def test_rows_cut_in_another_way_are_not_compiled_anew() -> None:
    """Nor do compiled layers go back to the mask: the operator is taken into their code as it is."""
    plain = LossModel(tiny("llama"))
    compiled = LossModel(copy.deepcopy(plain.model), compiled=True)
    assert compiled.by_segments
    frames = []
    for lengths in ((12, 4), (5, 5, 6), (16,)):
        batch = batch_of(pack(*(segment(length, 7 + length) for length in lengths)))
        ours, expected = (losses_and_gradients(each, batch) for each in (compiled, plain))
        torch.testing.assert_close(ours, expected)
        frames.append(counters["frames"]["ok"])
    assert frames[0] == frames[-1] > 0

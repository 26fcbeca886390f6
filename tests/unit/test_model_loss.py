"""The loss: the fused path against the plain one, isolation of packed segments, and FLOPs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distft.model import Batch, LossModel, chunk, flops_per_token
from distft.model.cross_entropy import LossHead

from .tiny_models import CONFIGS, VOCABULARY


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    supervised: np.ndarray
    segments: tuple[int, ...]


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a leak between segments would show
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).train()


def segment(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).astype(np.int32)


def pack(*segments: np.ndarray, skip: int = 0) -> Row:
    """One row; of each segment all but the first token, and the first ``skip``, are supervised."""
    supervised = np.concatenate([np.arange(len(each)) > skip for each in segments])
    return Row(np.concatenate(segments), supervised, tuple(len(each) for each in segments))


def batch_of(*rows: Row) -> Batch:
    return Batch.collate(rows, pad_id=0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


MIXED = batch_of(pack(segment(9, 1), segment(1, 2), segment(6, 3), skip=2), pack(segment(11, 4)))


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_and_plain_paths_are_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 4 * VOCABULARY * 7)
    model = tiny(name)
    plain, fast = LossModel(copy.deepcopy(model), fused=False), LossModel(model)
    assert fast.fused is (name != "gemma2")  # which caps its logits
    names = [parameter_name for parameter_name, _ in plain.named_parameters()]
    assert [parameter_name for parameter_name, _ in fast.named_parameters()] == names
    losses = []
    for each in (plain, fast):
        loss, rows = each(MIXED)
        (loss * 0.25).backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    expected, found = gradients(plain), gradients(fast)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6 * max(1.0, float(gradient.abs().max())))
    per_token = fast.token_losses(MIXED)
    torch.testing.assert_close(per_token, plain.token_losses(MIXED), rtol=1e-5, atol=1e-5)
    assert per_token.sum().item() == pytest.approx(losses[0], rel=1e-6)
    assert (per_token[MIXED.labels == -100] == 0).all()
    torch.testing.assert_close(rows, per_token.double().sum(1), rtol=1e-6, atol=0)
    assert not rows.requires_grad


def test_the_plain_path_is_what_transformers_computes() -> None:
    model = tiny("llama")
    ids = torch.from_numpy(segment(12, 5)).long()[None]
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    batch = batch_of(pack(segment(12, 5)))
    assert LossModel(model)(batch)[0].item() / 11 == pytest.approx(expected.item(), rel=1e-6)


def test_the_fused_path_would_be_wrong_where_logits_are_capped() -> None:
    """So the probe at construction is needed: without it, Gemma 2 would train on another loss."""
    model = tiny("gemma2")
    assert LossModel(copy.deepcopy(model), fused=True)(MIXED)[0].item() != pytest.approx(
        LossModel(model)(MIXED)[0].item(), rel=1e-3
    )


def test_a_cap_is_found_where_logits_are_still_small() -> None:
    model = tiny("gemma2")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-3)  # tied to the head: no logit comes near the cap
    assert not LossModel(model).fused
    assert LossModel(tiny("llama")).fused


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 8, 9])
def test_chunks_of_any_number_of_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 4 * VOCABULARY * 4)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = LossHead(8, VOCABULARY, bias=False, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    found = torch.autograd.grad(head(hidden, targets)[0] * 3, (hidden, head.weight))
    expected_loss = F.cross_entropy(hidden @ head.weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(expected_loss * 3, (hidden, head.weight))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    each = F.cross_entropy(hidden @ head.weight.T, targets, reduction="none")
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            total, losses = head(hidden, targets)
        torch.testing.assert_close(total, expected_loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(losses, each, rtol=1e-12, atol=1e-12)
        assert not losses.requires_grad


def test_gradient_agrees_with_finite_differences() -> None:
    """Torch's own gradcheck goes back through one graph several times, which this loss does not allow."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (5, 11))
    targets = torch.randint(0, 11, (5,), generator=generator)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        head = LossHead(6, 11, bias=False)
        head.weight = nn.Parameter(weight)
        result, _ = head(hidden.requires_grad_(), targets)
        result.backward()
        return torch.stack([result.detach(), (head.weight.grad * d_weight).sum() + (hidden.grad * d_hidden).sum()])

    d_hidden, d_weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    step = 1e-6
    slope = loss(hidden.clone(), weight.clone())[1]
    up = loss(hidden + step * d_hidden, weight + step * d_weight)[0]
    down = loss(hidden - step * d_hidden, weight - step * d_weight)[0]
    assert ((up - down) / (2 * step)).item() == pytest.approx(slope.item(), rel=1e-7)


def test_chunks_are_of_as_many_tokens_as_a_device_needs() -> None:
    assert [chunk.chunk_tokens(128_256, device) for device in ("cpu", "cuda")] == [65, 1024]
    assert [chunk.chunk_tokens(512, device) for device in ("cpu", "cuda")] == [16_384, 16_384]
    assert chunk.chunk_tokens(10**9, "cpu") == 1


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    loss, _ = LossModel(tiny("llama"))(MIXED)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


def test_bf16_accumulates_the_weights_gradient_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-tied", torch.bfloat16)
    batch = batch_of(*(pack(segment(40, seed)) for seed in range(4)))
    results = []
    for chunk_tokens in (1, 1000):
        monkeypatch.setattr(chunk, "CHUNK_BYTES", 4 * VOCABULARY * chunk_tokens)
        each = LossModel(copy.deepcopy(model))
        loss, _ = each(batch)
        loss.backward()
        results.append((loss.item(), each.model.get_output_embeddings().weight.grad.float()))
        assert loss.dtype == torch.float32
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    error = (results[0][1] - results[1][1]).norm() / results[1][1].norm()
    assert error < 4e-3


@pytest.mark.parametrize("fused", [True, False])
def test_invariant_5_masks_a_batch_without_targets_adds_nothing(fused: bool) -> None:
    model = LossModel(tiny("llama"), fused=fused)
    for batch in (Batch.empty(0), batch_of(pack(segment(5, 1), skip=9))):
        loss, rows = model(batch)
        loss.backward()
        assert loss.item() == 0
        assert rows.tolist() == [0.0]
        assert len(gradients(model)) == len(list(model.parameters()))
        assert all((gradient == 0).all() for gradient in gradients(model).values())
        assert (model.token_losses(batch) == 0).all()


def test_activation_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        model = LossModel(tiny("llama"), activation_checkpointing=checkpointing).train()
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules()) is checkpointing
        loss, _ = model(MIXED)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_invariant_4_isolation(name: str) -> None:
    """A segment has the same losses alone, packed with others, and in a padded row; whatever the others are."""
    model = LossModel(tiny(name)).eval()
    first, second, other = segment(9, 1), segment(7, 2), segment(9, 3)
    alone = model.token_losses(batch_of(pack(second)))[0, :6]
    packed = model.token_losses(batch_of(pack(first, second)))[0, 9:15]
    changed = model.token_losses(batch_of(pack(other, second)))[0, 9:15]
    padded = model.token_losses(batch_of(pack(segment(20, 4)), pack(second)))[1, :6]
    before = model.token_losses(batch_of(pack(second, first)))[0, :6]
    for losses in (packed, changed, padded, before):
        torch.testing.assert_close(losses, alone, rtol=1e-6, atol=1e-5 * float(alone.max()) / 10)
    assert torch.equal(packed, changed)
    assert alone.min() > 0


def test_invariant_4_isolation_fails_with_a_cache() -> None:
    """The trap this model avoids: transformers reads no boundaries from position_ids where a cache is in use."""
    model = tiny("llama").eval()
    first, second, other = segment(9, 1), segment(7, 2), segment(9, 3)

    def logits(batch: Batch, use_cache: bool) -> Tensor:
        with torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            return model(**inputs, use_cache=use_cache).logits[0, 9:]

    rows = batch_of(pack(first, second)), batch_of(pack(other, second))
    assert torch.equal(logits(rows[0], False), logits(rows[1], False))
    assert not torch.allclose(logits(rows[0], True), logits(rows[1], True), atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_flops_agree_with_torchs_counter(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    ids = torch.randint(3, VOCABULARY, (1, 48))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = counter.get_total_flops() / ids.numel()
    assert flops_per_token(model, 48) == pytest.approx(expected, rel=0.03)
    assert math.isfinite(expected)

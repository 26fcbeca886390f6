"""Norms and activation functions are computed again: the same numbers from less that is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from distft.config.sections import AdapterSection
from distft.model import Batch, LossModel, loss
from distft.model.adapter import add_adapter

from .tiny_models import CONFIGS, VOCABULARY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs layers keep everything")
#: What goes into each matrix product that follows a norm or an activation function.
AFTER = ("q_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_fc", "query_key_value", "dense_h_to_4h")


def tiny(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()


def plain(model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> LossModel:
    with monkeypatch.context() as patch:
        patch.setattr(loss, "recompute_elementwise", lambda model: None)
        return LossModel(copy.deepcopy(model))


def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=draw)
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    return Batch(ids, positions, torch.roll(ids, -1, 1))


def gradients(model: LossModel) -> dict[str, Tensor]:
    total, _ = model(batch())
    total.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": total.detach(), **found}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    kept, again = gradients(plain(model, monkeypatch)), gradients(LossModel(copy.deepcopy(model)))
    assert torch.equal(kept["loss"], again["loss"])
    assert kept.keys() == again.keys()
    torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-6)  # a norm's input gets its parts in another order


def alive(model: LossModel) -> tuple[dict[str, bool], Tensor]:
    """Which inputs of matrix products are still in memory after a forward pass, and its loss."""
    seen: dict[str, StorageWeakRef] = {}

    def note(name: str) -> Any:
        return lambda _, given: seen.__setitem__(name, StorageWeakRef(given[0].untyped_storage()))

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in AFTER:
            module.register_forward_pre_hook(note(name))
    total, _ = model(batch())
    return {name: not storage.expired() for name, storage in seen.items()}, total


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "neox"])
def test_what_goes_into_products_is_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    found, _ = alive(plain(model, monkeypatch))
    assert set(found.values()) == {True}
    found, total = alive(LossModel(copy.deepcopy(model)))
    assert set(found.values()) == {False}
    total.backward()


def test_each_is_computed_once_more_and_not_where_nothing_is_learnt() -> None:
    model = tiny("llama")
    calls: list[bool] = []
    silu = nn.functional.silu

    class Counted(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return silu(states)

    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Counted()
    trained = LossModel(model)
    calls.clear()
    gradients(trained)
    assert calls == [False, False, True, True]  # forwards, and once in the backward pass, of two layers
    calls.clear()
    trained.token_losses(batch())
    assert calls == [False, False]


def test_an_adapter_on_frozen_weights_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    add_adapter(model, AdapterSection(kind="lora", rank=4, dropout=0.1), seed=1)
    for each in model.parameters():  # an adapter begins with zeros, through which no gradient goes
        if each.requires_grad:
            nn.init.normal_(each, std=0.1)
    found = []
    for one in (plain(model, monkeypatch), LossModel(copy.deepcopy(model))):
        torch.manual_seed(2)
        found.append(gradients(one))
    assert torch.equal(found[0]["loss"], found[1]["loss"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_feed_forward_parts_of_other_kinds_are_left_as_they_are() -> None:
    model = tiny("llama")

    def other(states: Tensor) -> Tensor:
        mlp = model.model.layers[0].mlp
        return 2 * mlp.down_proj(mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states))

    model.model.layers[0].mlp.forward = other
    LossModel(model)
    assert model.model.layers[0].mlp.forward is other
    assert model.model.layers[1].mlp.forward is not other


def test_a_function_that_gives_its_input_back_and_a_norm_that_takes_more_are_computed_as_ever() -> None:
    class GatedNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))

        def forward(self, states: Tensor, gate: Tensor | None = None) -> Tensor:
            return self.weight * states * (1 if gate is None else gate)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = GatedNorm()

        def forward(self, states: Tensor) -> Tensor:
            return self.norm(states, gate=states.sigmoid())

    def changed() -> transformers.PreTrainedModel:
        model = tiny("gpt2")
        for layer in model.transformer.h:
            layer.mlp.act = transformers.activations.LinearActivation()
            layer.ln_2 = Gated()
        return model

    with pytest.MonkeyPatch.context() as patch:
        kept = gradients(plain(changed(), patch))
    again = gradients(LossModel(changed()))
    torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-6)

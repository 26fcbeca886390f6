"""LoRA, DoRA and rsLoRA: what is trained, that merging changes nothing, the folder for peft, and refused targets."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distft.config.sections import AdapterSection
from distft.errors import JobError
from distft.model import Batch, LossModel, flops_per_token, load_classifier, load_model
from distft.model.adapter import add_adapter, merge_adapter, write_adapter

from .tiny_models import CONFIGS, VOCABULARY

KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True, "alpha": 3.5}}
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
BATCH = Batch(IDS, torch.arange(12).expand(2, 12), IDS.roll(-1, 1))


def section(**values: Any) -> AdapterSection:
    return AdapterSection.model_validate({"kind": "lora", "rank": 4, **values})


def base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder)
    return folder


def adapted(folder: Path, labels: tuple[str, ...] = (), **values: Any) -> transformers.PreTrainedModel:
    """A model whose adapter has learnt something."""
    if labels:
        model = load_classifier(folder, torch.float32, labels=labels, pad_id=0)
    else:
        model = load_model(folder, torch.float32)
    add_adapter(model, section(**values), seed=3)
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_peft_loads_the_folder(name: str, kind: str, tmp_path: Path) -> None:
    folder = base(name, tmp_path / "base")
    model = adapted(folder, **KINDS[kind])
    expected = logits(model)
    assert (expected - logits(load_model(folder, torch.float32))).abs().max() > 1e-2
    write_adapter(model, tmp_path / "adapter", "somebody/base")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "somebody/base"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    theirs = peft.PeftModel.from_pretrained(load_model(folder, torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    plain = load_model(folder, torch.float32)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged", torch.float32)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifiers_head_goes_with_its_adapter(kind: str, tmp_path: Path) -> None:
    folder = base("llama", tmp_path / "base")
    model = adapted(folder, ("no", "yes"), **KINDS[kind])
    expected = logits(model)
    write_adapter(model, tmp_path / "adapter", "somebody/base")
    fresh = load_classifier(folder, torch.float32, labels=("no", "yes"), seed=99, pad_id=0)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_the_adapter_alone_is_trained_and_begins_as_nothing(tmp_path: Path) -> None:
    folder = base("llama-tied", tmp_path)
    plain = LossModel(load_model(folder, torch.float32))(BATCH)[0].item()
    for kind in KINDS.values():
        model = load_model(folder, torch.float32)
        add_adapter(model, section(**kind), seed=3)
        loss_model = LossModel(model)
        assert loss_model.fused
        loss, _ = loss_model(BATCH)
        assert loss.item() == pytest.approx(plain, rel=1e-6)
        loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert {name.split(".")[-4] for name in trained if "lora_A" in name} == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip


def test_it_is_drawn_from_the_seed_alone(tmp_path: Path) -> None:
    folder = base("llama", tmp_path)
    drawn = []
    for before, seed in ((1, 3), (2, 3), (2, 4)):
        model = load_model(folder, torch.float32)
        torch.manual_seed(before)
        add_adapter(model, section(), seed)
        after = torch.rand(1).item()
        assert after == torch.rand(1, generator=torch.Generator().manual_seed(before)).item()  # others' draws stay
        drawn.append(torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_bf16_model_has_a_bf16_adapter(tmp_path: Path) -> None:
    model = load_classifier(base("llama", tmp_path), torch.bfloat16, labels=("a", "b"))
    add_adapter(model, section(dora=True), seed=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [name for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name] == [
        "score.weight"
    ]


def test_dropout_is_the_adapters_and_drawn_from_the_seed_of_the_pass(tmp_path: Path) -> None:
    model = LossModel(adapted(base("llama", tmp_path), dropout=0.5))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.train()(BATCH)[0].item())
    assert losses[0] == losses[1] != losses[2]
    assert model.eval().token_losses(BATCH).sum().item() not in losses


def test_targets_by_name(tmp_path: Path) -> None:
    folder = base("llama", tmp_path)
    for asked, expected in (("q_proj", {"q_proj"}), (["mlp.up_proj", "k_proj"], {"up_proj", "k_proj"})):
        model = adapted(folder, targets=asked)
        assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == expected


@pytest.mark.parametrize("asked", ["attention", ["q_proj", "query"], "lm_head", "embed_tokens", "score", "_proj"])
def test_targets_that_are_none_are_refused_with_those_there_are(asked: Any, tmp_path: Path) -> None:
    folder = base("llama", tmp_path)
    with pytest.raises(JobError) as caught:
        adapted(folder, ("a", "b") if asked == "score" else (), targets=asked)
    assert "model.adapter.targets" in str(caught.value)
    assert str(asked[-1] if isinstance(asked, list) else asked) in str(caught.value)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_flops_with_frozen_weights_agree_with_torchs_counter(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    whole = flops_per_token(copy.deepcopy(model), 12)
    add_adapter(model, section(), seed=3)
    model.enable_input_require_grads()  # in the first layer too: of thirty that are nothing, of these two much
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    expected = counter.get_total_flops() / IDS.numel()
    assert flops_per_token(model, 12) == pytest.approx(expected, rel=0.03)
    assert flops_per_token(model, 12) < whole

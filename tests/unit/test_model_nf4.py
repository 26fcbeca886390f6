"""Quantised bases: what is rounded, that packed and plain weights compute the same, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from distft.config import Job
from distft.errors import CapacityError
from distft.model import Batch, LossModel, flops_per_token, load_classifier, load_model, training_model
from distft.model.nf4 import matrices, quantise

from .tiny_models import CONFIGS, VOCABULARY, WHY_NO_NF4, needs_bitsandbytes

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
BATCH = Batch(IDS, torch.arange(12).expand(2, 12), IDS.roll(-1, 1))


def base(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.initializer_range = 0.2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def adapted(folder: Path, dtype: torch.dtype = torch.float32, *, packed: bool = True, **adapter: Any) -> Any:
    values = {
        "name": "tiny",
        "model": {"source": str(folder), "adapter": {"kind": "lora", "rank": 2, "quantize": "nf4", **adapter}},
        "task": {"kind": "language_modeling"},
        "data": {"source": "rows.jsonl"},
    }
    return training_model(Job.from_values(values, folder), folder, dtype, [], 0, packed=packed)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("llama-tied", torch.float32), ("gpt2", torch.float32)],
)
def test_packed_and_plain_compute_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = base(name, tmp_path)
    whole, packed, plain = (load_model(folder, dtype) for _ in range(3))
    quantise(packed, packed=True)
    quantise(plain, packed=False)
    assert torch.equal(logits(packed), logits(plain))
    assert (logits(plain) - logits(whole)).abs().max() > 1e-2
    rounded = set(matrices(packed))
    assert rounded == set(matrices(whole))
    assert len(rounded) == 2 * (4 if name == "gpt2" else 7)
    for key, weight in whole.named_parameters():
        if key.removesuffix(".weight") in rounded:
            stored = packed.get_parameter(key)
            assert (stored.dtype, stored.numel()) == (torch.uint8, weight.numel() // 2)
            assert 0 < (plain.get_parameter(key) - weight).abs().max() < 0.2 * weight.abs().max()
        else:
            assert torch.equal(packed.get_parameter(key), weight)
            assert torch.equal(plain.get_parameter(key), weight)


@needs_bitsandbytes
@pytest.mark.parametrize(("name", "dora"), [("llama-tied", True), ("gpt2", False)])
def test_the_adapter_alone_is_trained_over_it(name: str, dora: bool, tmp_path: Path) -> None:
    folder = base(name, tmp_path)
    packed, plain = (LossModel(adapted(folder, packed=how, dora=dora)) for how in (True, False))
    for model in (packed, plain):
        model.train()(BATCH)[0].backward()
    trained = {name for name, one in packed.named_parameters() if one.requires_grad}
    assert trained == {name for name, one in packed.named_parameters() if "lora_" in name}
    gradients = [
        {key: one.grad for key, one in model.named_parameters() if key in trained} for model in (packed, plain)
    ]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-5, atol=1e-6)


@needs_bitsandbytes
def test_a_bf16_adapter_over_it_is_bf16(tmp_path: Path) -> None:
    model = adapted(base("llama", tmp_path), torch.bfloat16)
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.bfloat16}
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert model.dtype == torch.bfloat16


@needs_bitsandbytes
def test_a_classifiers_head_is_not_rounded(tmp_path: Path) -> None:
    model = load_classifier(base("llama", tmp_path), torch.float32, labels=("a", "b"), pad_id=0)
    quantise(model, packed=True)
    assert model.score.weight.dtype == torch.float32


@needs_bitsandbytes
def test_a_packed_weight_costs_what_a_plain_one_does(tmp_path: Path) -> None:
    folder = base("llama", tmp_path)
    packed, plain = (flops_per_token(adapted(folder, packed=how), 12) for how in (True, False))
    assert packed == plain


@pytest.mark.skipif("AVX-512" not in str(WHY_NO_NF4), reason="bitsandbytes is not here, or right on this processor")
def test_values_that_are_mixed_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"of 32 columns, to wrong values"):
        quantise(load_model(base("llama", tmp_path), torch.float32), packed=True)


def test_without_bitsandbytes_it_says_which_extra_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CapacityError, match=r"quantize.*not installed here\n.*pip install 'distft\[gpu\]'"):
        adapted(base("llama", tmp_path))

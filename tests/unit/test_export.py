"""Exports of every task, whole and as an adapter, loaded with nothing of ours."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from distft import engine as engines
from distft.checkpoint import Checkpoint, Folder, Saver, State
from distft.config import Job
from distft.errors import CheckpointError, JobError
from distft.export import export
from distft.model import DTYPES, Batch, LossModel, load_classifier, load_model, training_model
from distft.model.nf4 import quantise
from distft.world import World

from .tiny_models import CONFIGS, SMOLLM2, needs_bitsandbytes, tokenizer

TOKENS = tokenizer(**SMOLLM2)
PAD = 0  # <|endoftext|>: the tokenizer's own is the end of a turn
LABELS = ["down", "level", "up"]
TEXTS = ["a b", "the longest of the three texts, by far", "c"]
LORA = {"kind": "lora", "rank": 2}
QLORA = {**LORA, "quantize": "nf4"}


def base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CONFIGS["llama-tied"]()
    config.vocab_size = len(TOKENS)
    config.pad_token_id = 2  # as in SmolLM2's own folder
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    TOKENS.save_pretrained(folder)
    return folder


def job(kind: str, adapter: dict[str, Any] | None) -> Job:
    task = {"kind": kind, **({"prompt": "{a}", "response": "{b}"} if kind == "generation" else {})}
    values = {"name": "tiny", "model": {"source": "somebody/base", "adapter": adapter}, "task": task}
    return Job.from_values({**values, "data": {"source": "rows.jsonl"}}, Path())


def batch(classifies: bool) -> Batch:
    """The texts with their labels' numbers behind them, or as language."""
    ids = [
        np.array([*TOKENS(text)["input_ids"], *([number] if classifies else [])]) for number, text in enumerate(TEXTS)
    ]
    masks = [np.arange(len(one)) == len(one) - 1 if classifies else np.arange(len(one)) > 0 for one in ids]

    class Row:
        input_ids, supervised = np.concatenate(ids), np.concatenate(masks)
        segments = tuple(len(one) for one in ids)

    return Batch.collate([Row], PAD)


def trained(made: Job, folder: Path, home: Path, dtype: str = "fp32") -> tuple[Checkpoint, LossModel]:
    """A checkpoint of a few steps, and the model as it was then."""
    classifies = made.task.kind == "classification"
    labels = LABELS if classifies else []
    model = LossModel(training_model(made, folder, DTYPES[dtype], labels, PAD))
    engine = engines.open(model, engines.Settings(dtype=DTYPES[dtype]), World(), "plain")
    for _ in range(5):
        engine.forward_backward(batch(classifies), 0.1, last=True, seed=0)
        engine.step(0.05)
    saver = Saver(engine, Folder(home / "checkpoints"), bytes(32), 10**9)
    return saver.save(State(5, 1, 0, dtype, "x", labels=labels)), model.eval()


Make = Callable[..., tuple[Path, LossModel]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def exported(kind: str, adapter: dict[str, Any] | None, dtype: str = "fp32", **how: Any) -> tuple[Path, LossModel]:
        made, folder = job(kind, adapter), base(tmp_path / "base")
        checkpoint, model = trained(made, folder, tmp_path, dtype)
        return export(made, folder, checkpoint, tmp_path / "export", dtype=dtype, **how), model

    return exported


@torch.no_grad()
def predictions(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Of the texts, with transformers and the exported tokenizer alone: padded together, and one by one."""
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    together = model(**tokens(TEXTS, padding=True, return_tensors="pt")).logits
    return together, torch.cat([model(**tokens([text], return_tensors="pt")).logits for text in TEXTS])


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        LORA,
        {**LORA, "dora": True},
        pytest.param(QLORA, marks=needs_bitsandbytes),
        pytest.param({**QLORA, "dora": True}, marks=needs_bitsandbytes),
    ],
    ids=["full", "lora", "dora", "qlora", "qdora"],
)
def test_a_classifier_predicts_as_it_was_trained_to(adapter: dict[str, Any] | None, make: Make, tmp_path: Path) -> None:
    folder, model = make("classification", adapter)
    expected = model.class_log_probabilities(batch(True))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for logits in predictions(theirs, folder):
        torch.testing.assert_close(logits.log_softmax(1), expected, rtol=0, atol=1e-5)
    ours = LossModel(load_classifier(folder, torch.float32)).eval()
    torch.testing.assert_close(ours.class_log_probabilities(batch(True)), expected, rtol=0, atol=1e-5)
    assert theirs.config.id2label == {0: "down", 1: "level", 2: "up"}
    assert theirs.config.label2id == {"down": 0, "level": 1, "up": 2}
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"
    answers = transformers.pipeline("text-classification", model=str(folder), device="cpu")(TEXTS, batch_size=3)
    assert [answer["label"] for answer in answers] == [LABELS[number] for number in expected.argmax(1)]
    if adapter is not None:
        start = load_classifier(tmp_path / "base", torch.float32, labels=LABELS, seed=5, pad_id=PAD)
        if "quantize" in adapter:
            quantise(start, packed=True)
        beside = peft.PeftModel.from_pretrained(start, folder / "adapter").eval()
        torch.testing.assert_close(predictions(beside, folder)[0].log_softmax(1), expected, rtol=0, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "Labels: `down`, `level`, `up`." in card
    run_example(card, folder)


def run_example(card: str, folder: Path) -> None:
    """The code in the model card works."""
    exec(card.split("```python\n")[1].split("```")[0].replace("this/folder", str(folder)), {})


@pytest.mark.parametrize("kind", ["generation", "language_modeling"])
@pytest.mark.parametrize(
    "adapter", [None, LORA, pytest.param(QLORA, marks=needs_bitsandbytes)], ids=["full", "lora", "qlora"]
)
def test_a_language_model(kind: str, adapter: dict[str, Any] | None, make: Make, tmp_path: Path) -> None:
    folder, model = make(kind, adapter)
    expected = model.token_losses(batch(False))
    theirs = LossModel(transformers.AutoModelForCausalLM.from_pretrained(folder)).eval().token_losses(batch(False))
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    before = LossModel(load_model(tmp_path / "base", torch.float32)).eval().token_losses(batch(False))
    assert expected.sum() < before.sum() - 1
    settings = transformers.GenerationConfig.from_pretrained(folder)
    end_of_text, end_of_turn = (TOKENS.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>"))
    assert settings.eos_token_id == [end_of_text, end_of_turn]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert ("LoRA: rank 2, alpha 32; merged" in card) is (adapter is not None)
    assert ("rounded to 4 bits" in card) is (adapter == QLORA)
    run_example(card, folder)
    assert (folder / "adapter").exists() is (adapter is not None)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o644}
    hashes = json.loads((folder / "distft.json").read_text())["sha256"]
    assert {"model.safetensors", "README.md"} <= hashes.keys()
    assert ("adapter/adapter_model.safetensors" in hashes) is (adapter is not None)


def test_generate_stops_at_the_end_of_a_turn(make: Make) -> None:
    folder, _ = make("generation", None)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # a model that always says <|im_end|>
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, len(TOKENS))
        model.lm_head.bias.zero_()[TOKENS.convert_tokens_to_ids("<|im_end|>")] = 9
    prompt = TOKENS("hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=9, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 1


def test_the_adapter_alone(make: Make, tmp_path: Path) -> None:
    folder, model = make("generation", LORA, merge=False)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "distft.json",
    }  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base", torch.float32), folder).base_model.model
    losses = LossModel(theirs, fused=False).eval().token_losses(batch(False))
    torch.testing.assert_close(losses, model.token_losses(batch(False)), rtol=0, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert 'from_pretrained("somebody/base")' in card


@needs_bitsandbytes
def test_a_quantised_adapter_alone_is_loaded_as_its_card_says(make: Make, tmp_path: Path) -> None:
    folder, model = make("generation", QLORA, merge=False)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    space: dict[str, Any] = {}
    exec(code.replace("this/folder", str(folder)).replace("somebody/base", str(tmp_path / "base")), space)
    losses = LossModel(space["model"].base_model.model, fused=False).eval().token_losses(batch(False))
    torch.testing.assert_close(losses, model.token_losses(batch(False)), rtol=0, atol=1e-5)


def test_an_adapter_that_is_not_there_is_refused(make: Make) -> None:
    with pytest.raises(JobError, match="the run has no adapter"):
        make("generation", None, merge=False)


def test_bf16_is_merged_in_fp32_and_rounded_once(make: Make, tmp_path: Path) -> None:
    folder, model = make("language_modeling", LORA, dtype="bf16")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    layer = model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.lora_B["default"].weight.float() @ layer.lora_A[
        "default"
    ].weight.float() * (32 / 2)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, exact.bfloat16())
    assert (folder / "model.safetensors").stat().st_size < 1.2 * (
        tmp_path / "base/model.safetensors"
    ).stat().st_size / 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    checkpoint, _ = trained(job("language_modeling", None), folder, tmp_path)
    with pytest.raises(CheckpointError, match="do not fit"):
        export(job("language_modeling", LORA), folder, checkpoint, tmp_path / "export", dtype="fp32")
    assert not (tmp_path / "export").exists()

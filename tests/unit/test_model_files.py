"""model.source to a folder: local folders and what is refused in them, and small GGUF files made here."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from distft.config.sections import ModelSection
from distft.errors import CapacityError, DataError
from distft.model import load_model, load_tokenizer, materialise

from .tiny_models import CONFIGS, SHAPE, SMOLLM2, VOCABULARY, tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("DISTFT_CACHE", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    transformers.AutoModelForCausalLM.from_config(CONFIGS["llama-tied"]()).save_pretrained(folder)
    tokenizer(**SMOLLM2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def section(source: str, **settings: Any) -> ModelSection:
    return ModelSection(source=source, **settings)


def test_a_local_folder_is_returned_as_it_is(folder: Path) -> None:
    found = materialise(section("tiny"), folder.parent)
    assert found == folder
    model = load_model(found, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_model(found, torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(found)("ab")["input_ids"] == tokenizer(**SMOLLM2)("ab")["input_ids"]


def refused(folder: Path, match: str, **settings: Any) -> None:
    with pytest.raises(DataError, match=match):
        materialise(section(str(folder), **settings), folder)


def test_what_a_folder_lacks_is_said(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cut short")
    weights.unlink()
    refused(folder, "no weights")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "pickles")
    weights.write_bytes(whole)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    refused(folder, "model-00002-of-00002")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer")
    (folder / "config.json").write_text("{")
    refused(folder, "not JSON")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")
    refused(folder, "no sha256", sha256="0" * 64)


def test_code_of_the_models_own_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    edit(config, auto_map={"AutoConfig": "evil.Config"})
    refused(folder, "trust_remote_code")
    assert materialise(section(str(folder), trust_remote_code=True), folder) == folder
    edit(config, nested=[{"_attn_implementation_internal": "evil/kernel"}])
    refused(folder, "_attn_implementation_internal", trust_remote_code=True)
    shutil.copy(folder / "generation_config.json", config)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    refused(folder, "auto_map")


def test_weights_that_are_missing_are_never_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights are missing, model\.layers\.0\.mlp\.up_proj"):
        load_model(folder, torch.float32)
    edit(folder / "config.json", model_type="nothing_known")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(folder, torch.float32)


def test_a_missing_model_and_an_unreachable_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="tiny"):
        materialise(section("./tinny"), folder.parent)
    with pytest.raises(DataError, match="no model"):
        materialise(section("tiny/config.json"), folder.parent)
    with pytest.raises(DataError, match="revision"):
        materialise(section("nobody/nothing", sha256="0" * 64), folder)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be reached"):
        materialise(section("nobody/nothing"), folder)


def write_gguf(path: Path, *, pre: str | None = "smollm", architecture: str = "llama") -> dict[str, np.ndarray]:
    """A tiny Llama as llama.cpp's converter would write it, unquantised; its weights by GGUF name."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("Some Name")
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCABULARY + 200)
    made = tokenizer(**SMOLLM2)
    tokens = sorted(made.get_vocab(), key=made.get_vocab().get)
    tokens += ["Ġ1", "12"] + [f"unused{number}" for number in range(VOCABULARY + 200 - len(tokens) - 2)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ 1", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(str(SMOLLM2["template"]))
    hidden, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 16
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, shape in {
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_becomes_a_folder_once(tmp_path: Path, cache: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    sha256 = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(materialise(section("tiny.gguf", sha256=sha256), tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert found[0].parent == cache / "models"
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [found[0].name]
    stamp = (found[0] / "config.json").stat().st_mtime_ns
    assert (materialise(section("tiny.gguf"), tmp_path) / "config.json").stat().st_mtime_ns == stamp
    code = (  # what reads GGUF files takes 10 MB of a rank
        "import sys; from pathlib import Path; from distft.config import ModelSection;"
        "from distft.model import materialise; materialise(ModelSection(source='tiny.gguf'), Path(sys.argv[1]));"
        "sys.exit('gguf' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)

    model = load_model(found[0], torch.float32)
    np.testing.assert_array_equal(model.model.layers[1].mlp.down_proj.weight.detach(), weights["blk.1.ffn_down.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [0, 2]
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert "Some Name" not in (found[0] / "config.json").read_text()
    assert (found[0] / "model.safetensors").stat().st_mode & 0o777 == 0o644
    for name in ("config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (found[0] / name).read_text()


def test_the_tokenizer_of_a_gguf_file_is_repaired(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    made = load_tokenizer(materialise(section("tiny.gguf"), tmp_path))
    assert made.tokenize("a 12") == ["a", "Ġ", "1", "2"]  # transformers alone would merge: a, Ġ1, 2
    assert (made.pad_token, made.eos_token, made.padding_side) == ("<|endoftext|>", "<|im_end|>", "right")
    assert made.model_max_length == SHAPE["max_position_embeddings"]
    assert made.chat_template == SMOLLM2["template"]
    assert made("<|im_end|>")["input_ids"] == [2]
    auto = transformers.AutoTokenizer.from_pretrained(materialise(section("tiny.gguf"), tmp_path))
    assert auto.tokenize("a 12") == made.tokenize("a 12")


def test_other_pretokenisers_are_left_alone_or_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "gpt2.gguf", pre="gpt-2")
    made = load_tokenizer(materialise(section("gpt2.gguf"), tmp_path))
    assert isinstance(made.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    for pre in ("brand-new", "default", None):
        write_gguf(tmp_path / "unknown.gguf", pre=pre)
        with pytest.raises(DataError, match="pre-tokeniser"):
            materialise(section("unknown.gguf"), tmp_path)


def test_damaged_gguf_files_are_refused(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b"not a gguf file at all " * 9):
        (tmp_path / "tiny.gguf").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            materialise(section("tiny.gguf"), tmp_path)
    write_gguf(tmp_path / "tiny.gguf", architecture="unheard-of")
    with pytest.raises(DataError, match="cannot be read"):
        materialise(section("tiny.gguf"), tmp_path)
    with pytest.raises(DataError, match="sha256"):
        materialise(section("tiny.gguf", sha256="0" * 64), tmp_path)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CapacityError, match="DISTFT_CACHE"):
        materialise(section("tiny.gguf"), tmp_path)

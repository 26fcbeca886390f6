"""Small models of the kinds that real ones are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from distft.errors import DataError
from distft.model.shrink import shrink
from tests.unit.tiny_models import SMOLLM2, tokenizer


def folder_of(kind: str, folder: Path, **settings: object) -> Path:
    """A model's folder without weights: its configuration in the sizes that transformers has by default."""
    transformers.AutoConfig.for_model(kind, **settings).save_pretrained(folder)
    tokenizer(**SMOLLM2).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt", "falcon", "mixtral"]
)
def test_a_small_model_is_of_the_same_kind(kind: str, tmp_path: Path) -> None:
    given = folder_of(kind, tmp_path / "given", vocab_size=300, pad_token_id=0)
    before = transformers.AutoConfig.from_pretrained(given)
    model = transformers.AutoModelForCausalLM.from_pretrained(shrink(given, tmp_path / "small", seed=1))
    assert type(model.config) is type(before)
    assert model.config.vocab_size == 300
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    assert model.num_parameters() < 200_000
    assert not [name for name, value in model.config.to_dict().items() if "drop" in name and value]
    assert (tmp_path / "small" / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()


def test_it_is_drawn_from_the_seed_and_heads_stay_shared(tmp_path: Path) -> None:
    given = folder_of("llama", tmp_path / "given", vocab_size=300, num_attention_heads=32, num_key_value_heads=8)
    files = [
        (shrink(given, tmp_path / f"small-{turn}", seed=seed) / "model.safetensors").read_bytes()
        for turn, seed in enumerate([1, 1, 2])
    ]
    assert files[0] == files[1] != files[2]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "small-0")
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


def test_a_kind_with_sizes_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no small model of its kind can be made"):
        shrink(folder_of("mamba", tmp_path / "given"), tmp_path / "small", seed=1)

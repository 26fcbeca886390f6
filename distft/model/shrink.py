"""The same kind of model, made small: its architecture and tokenizer, few layers, random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from distft.errors import DataError

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, EXPERTS = 32, 4, 8, 64, 2, 4
#: The standard deviation of weights: with the usual 0.02 so narrow a model's logits are all but equal.
DEVIATION = 0.1

_CARRIED = {".json", ".txt", ".model", ".tiktoken", ".jinja", ".py"}


def shrink(folder: Path, to: Path, seed: int, *, trust_remote_code: bool = False) -> Path:
    """Writes a small model of the same architecture as a Hugging Face folder, with the tokenizer as it is.

    Dropout is off: what it drops depends on which rows share a micro-batch.

    Args:
        folder: The model's folder; its weights are not read.
        to: The folder to write.
        seed: Of the weights.
        trust_remote_code: Whether Python code in the folder may run.

    Returns:
        The folder.

    Raises:
        DataError: The architecture has sizes of its own, that this does not know.
    """
    transformers.logging.disable_progress_bar()
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.suffix in _CARRIED and not path.name.endswith(".index.json"):
            shutil.copy(path, to / path.name)
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
        for name, value in small(text).items():
            setattr(text, name, value)
        model = AutoModelForCausalLM.from_config(text, trust_remote_code=trust_remote_code, dtype=torch.float32)
        model.eval()(input_ids=torch.arange(4)[None] % text.vocab_size, use_cache=False)
        model.save_pretrained(to)
    except Exception as error:  # architectures check their sizes with errors of every kind
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"no small model of its kind can be made: {said[0]}",
            where=str(folder),
            fix="name a small model of another kind: --set model.source=FOLDER",
        ) from error
    return to


def small(config: PretrainedConfig) -> dict[str, Any]:
    """The sizes that differ from the model's own, by their names in its configuration; heads keep being shared or not.

    Names are those of transformers, which gives each architecture's own (GPT-2's ``n_embd``) as an alias of them.
    """
    shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    layers = min(LAYERS, config.num_hidden_layers)
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2 if shared else HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "n_inner": None,
        "ffn_dim": INTERMEDIATE,
        "ffn_hidden_size": INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
        "word_embed_proj_dim": HIDDEN,
        "rotary_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "initializer_range": DEVIATION,
        "init_std": DEVIATION,
        "use_cache": False,
    }
    for name, most in {
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS // 2,
    }.items():
        sizes[name] = min(most, getattr(config, name, None) or most)
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        sizes["layer_types"] = (list(dict.fromkeys(kinds)) + kinds)[:layers]  # one of each, where they differ
    dropout = {name: 0.0 for name, value in config.to_dict().items() if _drops(name) and isinstance(value, float | int)}
    return {name: value for name, value in sizes.items() if _can_set(config, name)} | dropout


def _can_set(config: PretrainedConfig, name: str) -> bool:
    computed = getattr(type(config), name, None)
    return hasattr(config, name) and not (isinstance(computed, property) and computed.fset is None)


def _drops(name: str) -> bool:
    return "dropout" in name or name.endswith("_pdrop")

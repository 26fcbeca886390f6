"""Which token ends a document, pads or stops, on small tokenizers of the shapes that real models have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distft.errors import DataError
from distft.model import end_of_text_id, load_tokenizer, pad_id, stop_ids, token_bytes

from .tiny_models import SMOLLM2, tokenizer

CASES = {  # name: (tokenizer, end of text, pad, stops)
    "smollm2-instruct, as published": (SMOLLM2, 0, 0, [0, 2]),
    "gpt2": ({"special": ["<|endoftext|>"], "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, 0, 0, [0]),
    "llama3-instruct": (
        {
            "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"],
            "template": "{{ m }}<|eot_id|>",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
        },
        1,
        2,
        [1, 3],
    ),
    "qwen-chat": (
        {
            "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            "template": "<|im_end|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        0,
        0,
        [0, 2],
    ),
    "qwen-base": (
        {"special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "eos_token": "<|endoftext|>"},
        0,
        0,
        [0],
    ),
    "llama2": (
        {"special": ["<unk>", "<s>", "</s>"], "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        2,
        0,
        [2],
    ),
    "gemma-chat": (
        {
            "special": ["<pad>", "<eos>", "<bos>", "<end_of_turn>"],
            "template": "{{ m }}<end_of_turn>",
            "pad_token": "<pad>",
            "eos_token": "<eos>",
        },
        1,
        0,
        [1, 3],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_roles_of_tokens(name: str) -> None:
    arguments, end, pad, stops = CASES[name]
    made = tokenizer(**arguments)
    assert (end_of_text_id(made), pad_id(made), stop_ids(made)) == (end, pad, stops)


def test_invariant_5_masks_padding_is_never_the_end_of_a_turn() -> None:
    made = tokenizer(**SMOLLM2)
    assert made.pad_token_id == made.eos_token_id == 2
    assert pad_id(made) != 2


def test_without_end_of_text_or_padding_there_is_advice() -> None:
    with pytest.raises(DataError, match="eos_token"):
        end_of_text_id(tokenizer(["<s>"], bos_token="<s>"))
    with pytest.raises(DataError, match="pad_token"):
        pad_id(tokenizer(["<|im_end|>"], eos_token="<|im_end|>"))


def test_token_bytes_add_up_to_the_text() -> None:
    made = tokenizer(**SMOLLM2)
    text = "Grüße, 世界 🌍\n"
    sizes = token_bytes(made)
    assert sizes[made(text)["input_ids"]].sum() == len(text.encode())
    assert sizes[:3].tolist() == [0, 0, 0]


def test_token_bytes_of_a_sentencepiece_vocabulary() -> None:
    backend = Tokenizer(models.BPE(vocab={"▁the": 0, "é": 1, "<0x0A>": 2, "</s>": 3}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)).tolist() == [4, 2, 1, 0]


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_tokenising_needs_no_torch(tmp_path: Path) -> None:
    """Ray starts a process for each tokenising task; torch would cost each of them seconds."""
    tokenizer(**SMOLLM2).save_pretrained(tmp_path)
    program = (
        "import sys, json, pathlib\n"
        "from distft.model import load_tokenizer, end_of_text_id, pad_id\n"
        f"t = load_tokenizer(pathlib.Path({str(tmp_path)!r}))\n"
        "print(json.dumps([len(t('abc')['input_ids']), end_of_text_id(t), pad_id(t), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == [3, 0, 0, False]

"""A tiny tokenizer, texts and jobs for tests of preparing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from distft.config import Job

PHRASE = "the state of our union is strong and the people know that we must do more for every child in this land"
WORDS = PHRASE.split()


def tokenizer_folder(folder: Path) -> Path:
    """Writes a model's folder with the tokenizer alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    tokenizer.train_from_iterator(
        [PHRASE] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, longest))) + f" {number}" for number in range(count)]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(folder: Path, source: Any = "*.jsonl", seed: int = 17, task: dict[str, Any] | None = None, **data: Any) -> Job:
    values = {
        "seed": seed,
        "model": {"source": "tiny"},
        "task": task or {"kind": "language_modeling"},
        "data": {
            "source": source,
            "max_tokens": 64,
            "overlong": "split",
            "splits": {"validation": 0.1, "test": 0.1},
            **data,
        },
    }
    return Job.from_values(values, folder)

"""A tiny Llama with random weights, a corpus of uneven documents, and jobs over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

from distft.config import Job
from distft.runs import Run, read_lines, training_curve
from distft.train import Outcome
from distft.train.reporter import Reporter
from distft.world import World

WORDS = ["the", "people", "of", "our", "union", "shall", "build", "roads", "and", "schools", "in", "peace"]


def make_model(folder: Path, *, dropout: float = 0.0, poison: str | None = None) -> None:
    """Two layers, hidden 32, bytes as its vocabulary; written as a Hugging Face folder.

    Args:
        folder: Where.
        dropout: Of attention.
        poison: A character whose embedding is not a number; the embeddings are tied where there is none.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|endoftext|>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=128,
        tie_word_embeddings=poison is None,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    if poison is not None:
        model.get_input_embeddings().weight.data[vocabulary[poison]] = float("nan")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def make_corpus(path: Path, documents: int = 90) -> None:
    """Documents of 5 to 400 characters, one a line; that of line 8 alone has a "~"."""
    draw = random.Random(3)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            words = draw.choices(WORDS, k=draw.choice([1, 3, 8, 20, 60]))
            text = " ".join([f"{number}{'~' if number == 7 else ':'}", *words])
            file.write(json.dumps({"text": text}) + "\n")


def make(folder: Path) -> None:
    """The model and the corpus under ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    make_model(folder / "dropout", dropout=0.2)
    make_model(folder / "poisoned", poison="~")
    make_corpus(folder / "corpus.jsonl")


def job(folder: Path, *settings: str, **sections: Any) -> Job:
    """A job over them; ``settings`` are ``dotted.key=value``."""
    values = {
        "name": "tiny",
        "model": {"source": "model", "dtype": "fp32"},
        "task": {"kind": "language_modeling"},
        "data": {
            "source": "corpus.jsonl",
            "max_tokens": 64,
            "overlong": "split",
            "splits": {"validation": 0.1, "test": 0.1},
        },
        "train": {
            "epochs": 1.38,  # 20 steps, the last of them short
            "batch_size": 7,
            "learning_rate": 1.0e-3,
            "weight_decay": 0.1,
            "validate_every": {"steps": 10},
        },
        "checkpoint": {"every": {"steps": 1000}, "budget": "1GB"},
        "track": {"tensorboard": False},
        **sections,
    }
    return Job.from_values(values, folder, settings)


def prepare(folder: Path) -> Path:
    """The prepared data of :func:`job`, in ``folder/cache``."""
    from distft.task.prepare import prepare as prepare_job

    return prepare_job(job(folder), folder / "model")


def train(
    folder: Path,
    name: str,
    *settings: str,
    resume: bool = False,
    kind: Literal["zero", "plain"] = "zero",
    model: str = "model",
    reporter: Reporter | None = None,
) -> Outcome:
    """Trains as this process's rank; the run is ``folder/runs/name``."""
    from distft.train.worker import work

    (prepared,) = (path for path in (folder / "cache" / "prepared").iterdir() if path.is_dir())
    world = World() if kind == "plain" else World.from_environment()
    made = job(folder, *settings)
    return work(made, world, run_of(folder, name), prepared, folder / model, reporter, resume=resume, kind=kind)


def run_of(folder: Path, name: str) -> Run:
    """The run of a name."""
    return Run(folder / "runs" / name)


def curve(folder: Path, name: str) -> list[dict[str, Any]]:
    """The training steps of a run."""
    return training_curve(run_of(folder, name).metrics)


def validations(folder: Path, name: str) -> list[dict[str, Any]]:
    """What validation found in a run."""
    return [line for line in read_lines(run_of(folder, name).metrics) if line["kind"] == "validation"]

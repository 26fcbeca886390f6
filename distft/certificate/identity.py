"""What a Hugging Face folder is, told from its files: hashes of weights, tokenizer, template and settings.

Nothing here imports torch: a hash of 500 MB takes as long as reading it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.errors import DataError
from distft.runs import read_json

#: Settings by which transformers and vLLM change what the likeliest token is, each with the value that changes nothing.
_CHANGING = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": None,
}

DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""The names that safetensors gives to our dtypes."""


@dataclass(frozen=True)
class Identity:
    """What a folder is.

    Attributes:
        tensors: Of each tensor ``"DTYPE SHAPE DIGEST"``, by name.
        tokenizer: A digest of each part of it; empty where it has no ``tokenizer.json``.
        template: The digest of the chat template; None where there is none.
        stops: The ids at which its own settings end an answer.
        settings: The other settings that change what the likeliest token is.
    """

    tensors: dict[str, str]
    tokenizer: dict[str, str]
    template: str | None
    stops: tuple[int, ...]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stops", tuple(self.stops))  # a list, where it was read from a file

    @property
    def weights(self) -> str:
        """One hash of all tensors: names, dtypes, shapes and bytes, in whatever files they lie."""
        return _one(self.tensors)

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of the tensors, as the job file names them."""
        found = {value.partition(" ")[0] for value in self.tensors.values()}
        return {DTYPES.get(name, name) for name in found}


def identity(folder: Path, *, weights: bool = True) -> Identity:
    """Reads every byte of the folder's weights; or none of them, and tells of no tensors.

    Raises:
        DataError: A file cannot be read.
    """
    try:
        stops, settings = _settings(folder)
        tensors = _tensors(folder) if weights else {}
        return Identity(tensors, _tokenizer(folder), _template(folder), stops, settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the model's files cannot be read: {error}", where=str(folder)) from error


def weights_of(folder: Path) -> str:
    """:attr:`Identity.weights` of a folder of which nothing else is looked at.

    Raises:
        DataError: A file cannot be read.
    """
    try:
        return _one(_tensors(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the weights cannot be read: {error}", where=str(folder)) from error


def _one(tensors: dict[str, str]) -> str:
    return _digest("\n".join(f"{name} {tensors[name]}" for name in sorted(tensors)))


def _digest(data: str | memoryview) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


def _tensors(folder: Path) -> dict[str, str]:
    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter free
        return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in _hashed(path, threads)}


def _hashed(path: Path, threads: ThreadPoolExecutor) -> Iterator[tuple[str, str]]:
    """The tensors of a file: a header of JSON behind its length in eight bytes, then bytes (the safetensors format)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = {name: entry for name, entry in json.loads(mapped[8:start]).items() if name != "__metadata__"}

        def one(name: str) -> tuple[str, str]:
            entry = header[name]
            first, last = (start + place for place in entry["data_offsets"])
            shape = "x".join(map(str, entry["shape"])) or "scalar"
            with memoryview(mapped) as whole, whole[first:last] as part:
                return name, f"{entry['dtype']} {shape} {_digest(part)}"

        yield from list(threads.map(one, header))


def _tokenizer(folder: Path) -> dict[str, str]:
    """The parts that make ids of text, written one way whatever library wrote the file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    values = read_json(path)
    model = values["model"]
    parts = {
        "vocabulary": model.get("vocab"),
        "merges": [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or []],
        "special tokens": sorted((one["id"], one["content"], one["special"]) for one in values["added_tokens"]),
        "normaliser": values.get("normalizer"),
        "pre-tokeniser": values.get("pre_tokenizer"),
    }
    return {name: _digest(json.dumps(value, sort_keys=True)) for name, value in parts.items()}


def _template(folder: Path) -> str | None:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return _digest(path.read_text(encoding="utf-8"))
    template = read_json(config).get("chat_template") if config.is_file() else None
    return None if template is None else _digest(template if isinstance(template, str) else json.dumps(template))


def _settings(folder: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
    path, config = folder / "generation_config.json", folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    stops = values["eos_token_id"] if "eos_token_id" in values else read_json(config).get("eos_token_id")
    listed = [] if stops is None else stops if isinstance(stops, list) else [stops]
    changing = {
        name: values[name]
        for name, harmless in _CHANGING.items()
        if values.get(name) is not None and values[name] != harmless
    }
    return tuple(sorted(listed)), changing

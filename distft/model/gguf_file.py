"""A quantised GGUF file as a Hugging Face folder in fp32, its tokenizer repaired.

transformers reads the weights. What it gets wrong on the way is put right here, each with a test:

- Pre-tokenisation. A GGUF file only names it (``tokenizer.ggml.pre``). transformers knows some names and takes
  GPT-2's for all others, which for SmolLM2 loses the splitting of digits (GPL-3: 7,658 tokens for 7,639). Names
  that are neither known there nor here are refused: tokens that differ from pretraining's spoil a model quietly.
- Padding. SmolLM2's file says pad = eos = the end of a turn; masking padding would unlearn stopping.
- ``model_max_length`` comes out as 1e30, ``padding_side`` is not saved, ``model.safetensors`` has mode 0600, and
  the generation settings know one eos only.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import gguf
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)

from distft.errors import CapacityError, DataError
from distft.model.tokenizer import pad_id, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# llama.cpp's src/llama-vocab.cpp splits all of these alike: each digit, then GPT-2's expression.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
# GPT-2's expression, which transformers falls back on.
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum"}
# Those transformers (5.23, integrations/gguf) has an expression for; the first also look up whole words first.
_WHOLE_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"}
_KNOWN_TO_TRANSFORMERS = {"qwen2", "deepseek-r1-qwen", "qwen35", "gpt-4o", "llama4", "dbrx", "smaug-bpe", "megrez"}


def convert(path: Path, target: Path) -> None:
    """Writes the model of a GGUF file as a new Hugging Face folder.

    Args:
        path: The GGUF file.
        target: A folder that does not exist yet.

    Raises:
        DataError: The file is damaged, of an architecture that transformers cannot read from GGUF, or its tokenizer
            cannot be rebuilt faithfully.
        CapacityError: The disk is too small.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with _read_once():
        try:
            reader = gguf.GGUFReader(str(path))
            pre_tokenizer = _pre_tokenizer(reader, path)
            _check_space(reader, target)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            # The default, from_pretrained(gguf_file=...) alone, gives a model that cannot be trained or saved.
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        except (ValueError, KeyError, IndexError, NotImplementedError, OverflowError) as error:
            raise DataError(
                f"the file cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                where=str(path),
                fix="a GGUF file that is whole, of an architecture transformers can read from GGUF; or the model's "
                "Hugging Face folder",
            ) from error
    context = int(model.config.max_position_embeddings)
    repaired = _repaired(tokenizer, pre_tokenizer, context)
    _settle(model, repaired)
    model.save_pretrained(target)
    repaired.save_pretrained(target)
    _write_padding_side(target / "tokenizer_config.json")
    for written in target.iterdir():
        written.chmod(0o644)


@contextmanager
def _read_once() -> Iterator[None]:
    """Lets transformers read the file once instead of three times, build its name table once instead of 400, quietly.

    Both are pure; remembering them halves the time for SmolLM2. The progress bar heeds no setting. Remove when
    transformers reads such architectures with its own reader (integrations/gguf/reader.py), as it does some already.
    """
    reader = modeling_gguf_pytorch_utils
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        mock.patch.object(reader, "tqdm", functools.partial(reader.tqdm, disable=True)),
    ):
        yield


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _pre_tokenizer(reader: Any, path: Path) -> str | None:
    """The name of a byte-level vocabulary's pre-tokeniser; None for SentencePiece, which has none.

    Raises:
        DataError: It is one whose rules are known neither to transformers nor to us.
    """
    if _field(reader, "tokenizer.ggml.model") != "gpt2":
        return None
    name = _field(reader, "tokenizer.ggml.pre")
    if name in _SINGLE_DIGITS | _GPT2 | _WHOLE_WORDS_FIRST | _KNOWN_TO_TRANSFORMERS:
        return str(name)
    raise DataError(
        f"its pre-tokeniser is {name!r}, whose rules are not known here",
        where=str(path),
        fix="use the model's Hugging Face folder or hub id, where the rules are written out in tokenizer.json",
    )


def _check_space(reader: Any, target: Path) -> None:
    needed = sum(4 * int(tensor.n_elements) for tensor in reader.tensors)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        raise CapacityError(
            f"the model takes {needed / 1e9:.1f} GB dequantised, and {free / 1e9:.1f} GB are free",
            where=str(target.parent),
            fix="free some, or set DISTFT_CACHE to a folder on a larger disk",
        )


def _repaired(tokenizer: Any, pre_tokenizer: str | None, context: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if pre_tokenizer in _SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    if pre_tokenizer in _WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True  # llama.cpp sets it for these; the GGUF file does not say
    repaired = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    repaired.chat_template = tokenizer.chat_template
    repaired.pad_token = repaired.convert_ids_to_tokens(pad_id(repaired))
    return repaired


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes configuration and generation settings agree with the tokenizer, and drops the file's own name."""
    config, settings = model.config, model.generation_config
    vars(config).pop("_model_name_or_path", None)
    config.pad_token_id = settings.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = settings.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    settings._from_model_config = False  # else transformers may make the settings anew from config.json
    stops = stop_ids(tokenizer)
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops


def _write_padding_side(path: Path) -> None:
    """save_pretrained leaves ``padding_side`` out."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["padding_side"] = "right"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Tokenizers: loading them, and which token ends a document, fills a row or stops generation.

Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distft.errors import DataError
from distft.model.decoding import Spelling

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Chat models name the end of a turn as their eos; the token that pretraining put between documents is another one.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>")
_PADDING = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", *_END_OF_TEXT)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder.

    A ``tokenizer.json`` is taken as it is. Going through AutoTokenizer costs the import of torch (seconds, in every
    tokenising task), which only tokenizers without that file, or with code of their own, need.

    Raises:
        DataError: The folder holds no tokenizer that can be read.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        if (folder / "tokenizer.json").is_file() and not trust_remote_code:
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the tokenizer cannot be read: {said[0]}", where=str(folder)) from error


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: the token that pretraining put there, which in a chat model is not its eos.

    ``<|endoftext|>`` (GPT-2, Qwen, SmolLM), ``<|end_of_text|>`` (Llama 3), else the tokenizer's eos.

    Raises:
        DataError: The tokenizer has neither.
    """
    known = tokenizer.get_added_vocab()
    found = next((known[name] for name in _END_OF_TEXT if name in known), tokenizer.eos_token_id)
    if found is None:
        raise DataError(
            "the tokenizer has no end-of-text token",
            where="tokenizer_config.json",
            fix='give it one: "eos_token": the token that ended documents in pretraining',
        )
    return int(found)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows; never the end of a turn, which must stay a token that is learnt.

    The tokenizer's own where it is not its eos too (SmolLM2's is: masking it would unlearn stopping), else a token
    made for padding, else the end of text, else the unknown token.

    Raises:
        DataError: Nothing will do.
    """
    known = tokenizer.get_added_vocab()
    eos = tokenizer.eos_token_id
    turn_ends = {known[name] for name in _END_OF_TURN if name in known}
    candidates = [tokenizer.pad_token_id, *(known.get(name) for name in _PADDING), tokenizer.unk_token_id]
    for candidate in candidates:
        if candidate is not None and candidate != eos and candidate not in turn_ends:
            return int(candidate)
    if eos is not None and eos not in turn_ends:
        return int(eos)  # GPT-2: the only special token there is, and it ends texts, not turns
    raise DataError(
        "the tokenizer has no token to pad with",
        where="tokenizer_config.json",
        fix='give it one that is not the end of a turn: "pad_token": "<pad>"',
    )


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end generation: eos, the end of text and, with a chat template, the ends of turn in it."""
    known = tokenizer.get_added_vocab()
    template = str(tokenizer.chat_template or "")
    turns = {known[name] for name in _END_OF_TURN if name in known and name in template}
    eos = {tokenizer.eos_token_id} - {None}
    return sorted(turns | eos | {end_of_text_id(tokenizer)})


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """UTF-8 bytes of text that each id stands for, (V,); special tokens stand for none."""
    spelling, backend = Spelling(tokenizer), tokenizer.backend_tokenizer
    special = {number for number, added in backend.get_added_tokens_decoder().items() if added.special}
    ids = range(max(backend.get_vocab().values()) + 1)
    return np.array([0 if id in special else len(spelling(id)) for id in ids], dtype=np.int64)

"""A tokenizer at full speed: ids of many texts at once, and the bytes of text that each id stands for.

Legend: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders

from distft.data.example import DROPPED, KEPT, NO_TARGET, OVERLONG, SPLIT, TRUNCATED
from distft.errors import DataError


def fast_tokenizer(tokenizer: Any) -> str:
    """The fast tokenizer inside one of transformers, as the tokenizers library writes it.

    Raises:
        DataError: The tokenizer is one of the slow kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} has no fast form",
            where="model.source",
            fix="the model's folder needs a tokenizer.json; for most models "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
        )
    return str(backend.to_str())


def cut(tokens: int, max_tokens: int, overlong: str) -> tuple[tuple[tuple[int, int], ...], str]:
    """The (start, length) spans of a document that are used, and its fate.

    With "split", neighbouring spans share one token: the last of one is the first, a context only, of the next. So
    every token of the document but its first is a target exactly once, as an honest perplexity needs.

    Args:
        tokens: Length of the document.
        max_tokens: Longest span, at least 2.
        overlong: What becomes of a longer document.
    """
    if tokens < 2:
        return (), NO_TARGET
    if tokens <= max_tokens:
        return ((0, tokens),), KEPT
    if overlong == "truncate":
        return ((0, max_tokens),), TRUNCATED
    if overlong == "split":
        starts = range(0, tokens - 1, max_tokens - 1)
        return tuple((start, min(max_tokens, tokens - start)) for start in starts), SPLIT
    return (), DROPPED if overlong == "drop" else OVERLONG


class Encoder:
    """A tokenizer and the number of UTF-8 bytes that each of its tokens stands for."""

    def __init__(self, tokenizer_json: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._bytes = _bytes_of_byte_level(self.tokenizer)
        self._adds_special = self.tokenizer.num_special_tokens_to_add(False) > 0

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[tuple[list[int], NDArray[np.int64]]]:
        """Ids of each text, and the UTF-8 bytes of it that each stands for, int64 (T,), which sum to the text's.

        A byte-level vocabulary tells the bytes of each token, and leaves the tokenizer free not to keep count of
        offsets, a tenth of its time. Where these bytes do not add up to the text (it was normalised), and with other
        vocabularies, offsets do: a token reaches from where the one before ended to where it ends itself.

        Args:
            texts: The texts.
            special: Whether the tokenizer adds what it adds to a text, such as a beginning of text.
        """
        if self._bytes is None:
            encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=special)
            return [_by_offset(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
        result = []
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            token_bytes = self._bytes[ids] if ids else np.zeros(0, dtype=np.int64)
            if special and self._adds_special:
                token_bytes[np.flatnonzero(encoding.special_tokens_mask)] = 0
            if token_bytes.sum() == (len(text) if text.isascii() else len(text.encode())):
                result.append((ids, token_bytes))
            else:
                result.append(_by_offset(text, self.tokenizer.encode(text, add_special_tokens=special)))
        return result


@functools.lru_cache(maxsize=4)
def encoder(tokenizer_json: str) -> Encoder:
    """Built once a process: parsing a vocabulary takes a tenth of a second."""
    return Encoder(tokenizer_json)


@functools.lru_cache(maxsize=2)
def continuing(tokenizer_json: str) -> str:
    """The same tokenizer for text that goes on after other text: it puts no space before the first word.

    Llama 2's and its kin do, for the beginning of a text: what a model writes after a prompt has no such space.
    """
    settings = json.loads(tokenizer_json)
    normalizer, pre_tokenizer = (_without_space(settings.get(key)) for key in ("normalizer", "pre_tokenizer"))
    if (normalizer, pre_tokenizer) == (settings.get("normalizer"), settings.get("pre_tokenizer")):
        return tokenizer_json
    return json.dumps({**settings, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}, ensure_ascii=False)


def _without_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = step["type"] if step else None
    if step is None or kind == "Prepend":
        return None
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [kept for inner in step[key] if (kept := _without_space(inner)) is not None]}
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel" and step.get("add_prefix_space"):
        return {**step, "add_prefix_space": False}
    return step


def _bytes_of_byte_level(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    """Bytes of each id of a byte-level vocabulary, int64 (V,): each letter of such a token is one byte."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    vocabulary = tokenizer.get_vocab()
    result = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        result[number] = len(token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        result[number] = len(added.content.encode("utf-8"))
    return result


def _by_offset(text: str, encoding: Encoding) -> tuple[list[int], NDArray[np.int64]]:
    if not len(encoding):
        return [], np.zeros(0, dtype=np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], dtype=np.int64))
    ends[-1] = len(text)
    letters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (letters >= 0x80).astype(np.int64) + (letters >= 0x800) + (letters >= 0x10000)
    bytes_until = np.concatenate(([0], np.cumsum(widths)))
    return encoding.ids, np.diff(bytes_until[ends], prepend=0)

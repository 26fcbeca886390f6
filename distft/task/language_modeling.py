"""Language modelling: every token of a document but its first is predicted from those before it.

Legend: T tokens of a document, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders

from distft.data.example import DROPPED, KEPT, NO_TARGET, OVERLONG, SPLIT, TRUNCATED, Example
from distft.errors import DataError


@dataclass(frozen=True)
class LanguageModeling:
    """The task with all it needs, as plain values that travel to other processes.

    Attributes:
        tokenizer_json: The fast tokenizer as the tokenizers library writes it.
        end_of_text: Id that ends each document.
        max_tokens: Longest segment.
        overlong: What becomes of a longer document: "error", "drop", "truncate" or "split".
        column: The column that holds the text.
    """

    tokenizer_json: str
    end_of_text: int
    max_tokens: int
    overlong: str
    column: str = "text"

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, end_of_text: int, *, max_tokens: int, overlong: str, column: str
    ) -> LanguageModeling:
        """The task for a transformers tokenizer.

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
        return cls(backend.to_str(), end_of_text, max_tokens, overlong, column)

    @property
    def columns(self) -> tuple[str, ...]:
        """The one text column."""
        return (self.column,)

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        """Each document as the tokenizer's own beginning of text where it adds one, the text, and the end of text."""
        documents = [text for (text,) in texts]
        encoded = _encoder(self.tokenizer_json).encode(documents)
        return [self._example(ids, token_bytes) for ids, token_bytes in encoded]

    def _example(self, ids: list[int], token_bytes: NDArray[np.int64]) -> Example:
        if not ids or ids[-1] != self.end_of_text:
            ids = [*ids, self.end_of_text]
        spans, fate = cut(len(ids), self.max_tokens, self.overlong)
        end = spans[-1][0] + spans[-1][1] if spans else 0
        return Example(np.array(ids, dtype=np.int32), spans, fate, int(token_bytes[1:end].sum()))


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


class _Encoder:
    """A tokenizer and the number of UTF-8 bytes that each of its tokens stands for."""

    def __init__(self, tokenizer_json: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._bytes = _bytes_of_byte_level(self.tokenizer)
        self._adds_special = self.tokenizer.num_special_tokens_to_add(False) > 0

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], NDArray[np.int64]]]:
        """Ids of each text, and the UTF-8 bytes of it that each stands for, int64 (T,), which sum to the text's.

        A byte-level vocabulary tells the bytes of each token, and leaves the tokenizer free not to keep count of
        offsets, a tenth of its time. Where these bytes do not add up to the text (it was normalised), and with other
        vocabularies, offsets do: a token reaches from where the one before ended to where it ends itself.
        """
        if self._bytes is None:
            encodings = self.tokenizer.encode_batch(list(texts))
            return [_by_offset(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
        result = []
        for text, encoding in zip(texts, self.tokenizer.encode_batch_fast(list(texts)), strict=True):
            ids = encoding.ids
            token_bytes = self._bytes[ids] if ids else np.zeros(0, dtype=np.int64)
            if self._adds_special:
                token_bytes[np.flatnonzero(encoding.special_tokens_mask)] = 0
            if token_bytes.sum() == (len(text) if text.isascii() else len(text.encode())):
                result.append((ids, token_bytes))
            else:
                result.append(_by_offset(text, self.tokenizer.encode(text)))
        return result


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer_json: str) -> _Encoder:
    """Built once a process: parsing a vocabulary takes a tenth of a second."""
    return _Encoder(tokenizer_json)


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

"""Language modelling: every token of a document but its first is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.data.example import Column, Example
from distft.task.encoder import cut, encoder, fast_tokenizer


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
        return cls(fast_tokenizer(tokenizer), end_of_text, max_tokens, overlong, column)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The one text column."""
        return (Column(self.column),)

    @property
    def facts(self) -> dict[str, Any]:
        """None: the text is used as it is."""
        return {}

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        """Each document as the tokenizer's own beginning of text where it adds one, the text, and the end of text."""
        documents = [text for (text,) in texts]
        encoded = encoder(self.tokenizer_json).encode(documents)
        return [self._example(ids, token_bytes) for ids, token_bytes in encoded]

    def _example(self, ids: list[int], token_bytes: NDArray[np.int64]) -> Example:
        if not ids or ids[-1] != self.end_of_text:
            ids = [*ids, self.end_of_text]
        spans, fate = cut(len(ids), self.max_tokens, self.overlong)
        end = spans[-1][0] + spans[-1][1] if spans else 0
        return Example(np.array(ids, dtype=np.int32), spans, fate, int(token_bytes[1:end].sum()))

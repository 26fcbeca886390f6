"""Classification: a text's label is predicted from its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distft.data.example import NO_TARGET, TRUNCATED, Column, Example
from distft.task.encoder import cut, encoder, fast_tokenizer


@dataclass(frozen=True)
class Classification:
    """The task with all it needs, as plain values that travel to other processes.

    An example is the text exactly as the tokenizer gives it, and one more id, the only target: the label's number,
    which preparing puts there once it knows all labels. So a classifier learns as a language model does, by predicting
    what comes next, and all that holds for rows of text holds for it: packing, isolation, order, the loss.

    Attributes:
        tokenizer_json: The fast tokenizer as the tokenizers library writes it.
        max_tokens: Longest example, the label's place included.
        overlong: What becomes of a longer one: "error", "drop" or "truncate".
        text: The column that holds the text.
        label: The column that holds the label.
    """

    tokenizer_json: str
    max_tokens: int
    overlong: str
    text: str = "text"
    label: str = "label"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, max_tokens: int, overlong: str, text: str, label: str) -> Classification:
        """The task for a transformers tokenizer.

        Raises:
            DataError: The tokenizer is one of the slow kind.
        """
        return cls(fast_tokenizer(tokenizer), max_tokens, overlong, text, label)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The text and the label."""
        return (Column(self.text), Column(self.label, "label"))

    @property
    def facts(self) -> dict[str, Any]:
        """None: the text is used as it is."""
        return {}

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        """Each text as the tokenizer gives it, and a place for its label. What is too long loses its end."""
        encoded = encoder(self.tokenizer_json).encode([text for text, _ in texts])
        return [self._example(ids, label) for (ids, _), (_, label) in zip(encoded, texts, strict=True)]

    def _example(self, ids: list[int], label: str) -> Example:
        spans, fate = cut(len(ids) + 1, self.max_tokens, self.overlong)
        gone: tuple[tuple[str, int], ...] = ()
        if fate == TRUNCATED:
            gone = ((self.text, len(ids) + 1 - self.max_tokens),)
            ids = ids[: self.max_tokens - 1]
        supervised = np.zeros(len(ids) + 1, dtype=bool)
        supervised[-1] = fate != NO_TARGET
        return Example(np.array([*ids, 0], dtype=np.int32), spans, fate, 0, supervised, label, gone)

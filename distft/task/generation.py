"""Generation: answers are learnt, what they answer is context.

An answer's end of turn is learnt with it, so that the model stops. Context and answers are tokenised apart and joined:
training then sees the very ids that generation sees, a prompt's and after them an answer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.config import TaskSection
from distft.data.example import KEPT, NO_TARGET, TRUNCATED, Column, Example
from distft.errors import DataError
from distft.task.encoder import continuing, cut, encoder, fast_tokenizer
from distft.task.presets import MESSAGES, Wording, wording_of
from distft.task.template import ChatTemplate, Message, Piece, answered

_MARK = "7markq7"  # words that no template holds


@dataclass(frozen=True)
class _Tokens:
    """A row as ids (T,), which of them are targets (T,), and the UTF-8 bytes that each stands for (T,)."""

    ids: list[int]
    supervised: NDArray[np.bool_]
    bytes: NDArray[np.int64]

    def first(self, tokens: int) -> _Tokens:
        """The first so many."""
        return _Tokens(self.ids[:tokens], self.supervised[:tokens], self.bytes[:tokens])


@dataclass(frozen=True)
class Generation:
    """The task with all it needs, as plain values that travel to other processes.

    Attributes:
        tokenizer_json: The fast tokenizer as the tokenizers library writes it.
        template: The tokenizer's chat template; None: prompt and response are plain text.
        wording: How a row becomes a prompt and a response; None: rows are conversations.
        messages: The column of conversations.
        end_of_text: Id that ends a plain response.
        max_tokens: Longest example.
        overlong: What becomes of a longer one: "error", "drop" or "truncate".
        preset: The preset's name, for the card.
    """

    tokenizer_json: str
    template: ChatTemplate | None
    wording: Wording | None
    messages: str
    end_of_text: int
    max_tokens: int
    overlong: str
    preset: str | None = None

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        section: TaskSection,
        *,
        stops: Sequence[int],
        end_of_text: int,
        max_tokens: int,
        overlong: str,
    ) -> Generation:
        """The task for a transformers tokenizer.

        Raises:
            DataError: The tokenizer is one of the slow kind, has no chat template where rows are conversations, or one
                that cannot render them.
        """
        template = ChatTemplate.of(tokenizer, stops)
        wording = wording_of(section, plain=template is None)
        if template is None and wording is None:
            raise DataError(
                "the tokenizer has no chat template, which conversations need",
                where="model.source",
                fix="give task.prompt and task.response in place of messages, or put a chat_template.jinja in the "
                "model's folder",
            )
        return cls(
            fast_tokenizer(tokenizer),
            template,
            wording,
            section.messages or MESSAGES,
            end_of_text,
            max_tokens,
            overlong,
            section.preset,
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """The conversation's column, or those of the prompt and the response."""
        if self.wording is None:
            return (Column(self.messages, "messages"),)
        named = dict.fromkeys(self.wording.prompt_columns + self.wording.response_columns)
        return tuple(Column(name, optional=name in self.wording.optional) for name in named)

    @property
    def facts(self) -> dict[str, Any]:
        """How rows are worded, and what the template adds to them."""
        facts: dict[str, Any] = {
            "template": "plain text" if self.template is None else "chat template of the tokenizer",
            "preset": self.preset,
        }
        if self.wording is not None:
            facts |= {"prompt": self.wording.prompt, "response": self.wording.response}
        return facts | (self.template.facts if self.template else {"adds": []})

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        """Each row as prompt, response and end of turn; of a conversation, every answer is a target.

        Raises:
            DataError: The template refuses a row, or ends an answer without a token that stops generation.
        """
        rows = [self._pieces(values) for values in texts]
        examples = [self._example(values, tokens) for values, tokens in zip(texts, self._tokens(rows), strict=True)]
        if self.wording is not None:
            return examples
        said = [len(answered(json.loads(conversation))) for (conversation,) in texts]
        learnt = [sum(piece.answer for piece in row) for row in rows]
        return [replace(one, unlearnt=all_ - some) for one, all_, some in zip(examples, said, learnt, strict=True)]

    def opening(self, prompt: str) -> str:
        """The text that a model is given to answer a person's prompt, as it was in training.

        With a chat template a user's turn, up to where the answer begins; else the prompt with the words that end the
        job's own, unless it ends so already.
        """
        if self.template is not None:
            return self.template.opening([{"role": "user", "content": prompt}])
        assert self.wording is not None, "conversations need a template"
        end = self.wording.prompt.rpartition("}")[2]
        return prompt if prompt.endswith(end) else prompt + end

    def opening_ids(self, prompt: str) -> list[int]:
        """The token ids of :meth:`opening`."""
        return self._ids(self.opening(prompt))

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the model's next answer begins; there must be a chat template.

        Raises:
            DataError: The template refuses the conversation.
        """
        assert self.template is not None, "conversations need a template"
        return self._ids(self.template.opening(messages))

    def words_of(self, text: str) -> str | None:
        """The prompt whose :meth:`opening` a text is; None where it is none, as with a conversation of more turns."""
        before, _, after = self.opening(_MARK).partition(_MARK)
        words = text[len(before) : len(text) - len(after)]
        return words if before + words + after == text and not (after and after in words) else None

    def _ids(self, text: str) -> list[int]:
        (tokens,) = self._tokens([[Piece(text, False)]])
        return tokens.ids

    def _pieces(self, values: tuple[str, ...]) -> list[Piece]:
        if self.wording is None:
            assert self.template is not None, "conversations need a template"
            return self.template.pieces(json.loads(values[0]))
        named = dict(zip((column.name for column in self.columns), values, strict=True))
        prompt, response = self.wording.worded(named)
        if self.template is None:
            return [Piece(prompt, False), Piece(response, True)]
        return self.template.pieces([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])

    def _tokens(self, rows: Sequence[Sequence[Piece]]) -> Iterator[_Tokens]:
        """The rows' tokens, all pieces at once: a row's first begins a text, the others go on after it."""
        beginnings = encoder(self.tokenizer_json).encode(
            [row[0].text for row in rows],
            special=self.template is None,  # a template writes them itself
        )
        others = iter(
            encoder(continuing(self.tokenizer_json)).encode(
                [piece.text for row in rows for piece in row[1:]], special=False
            )
        )
        for row, (ids, token_bytes) in zip(rows, beginnings, strict=True):
            if self.template is None and ids[-1:] == [self.end_of_text]:
                ids, token_bytes = ids[:-1], token_bytes[:-1]  # some tokenizers end every text
            encoded = [(ids, token_bytes), *(next(others) for _ in row[1:])]
            yield self._joined(row, encoded)

    def _joined(self, row: Sequence[Piece], encoded: Sequence[tuple[list[int], NDArray[np.int64]]]) -> _Tokens:
        ids: list[int] = []
        masks, sizes = [], []
        for piece, (piece_ids, token_bytes) in zip(row, encoded, strict=True):
            if piece.answer and self.template is None:
                piece_ids, token_bytes = [*piece_ids, self.end_of_text], np.append(token_bytes, 0)
            if piece.answer:
                token_bytes[-1] = 0  # an end of turn stands for no text
            ids += piece_ids
            masks.append(np.full(len(piece_ids), piece.answer))
            sizes.append(token_bytes)
        return _Tokens(ids, np.concatenate(masks), np.concatenate(sizes))

    def _example(self, values: tuple[str, ...], tokens: _Tokens) -> Example:
        spans, fate = cut(len(tokens.ids), self.max_tokens, self.overlong)
        gone: dict[str, int] = {}
        if fate == TRUNCATED:
            tokens, gone = self._shortened(values, tokens)
            spans = ((0, len(tokens.ids)),)
        if fate in (KEPT, TRUNCATED) and not tokens.supervised[1:].any():
            spans, fate = (), NO_TARGET
        targets = np.zeros(len(tokens.ids), dtype=bool)
        for start, length in spans:
            targets[start + 1 : start + length] = tokens.supervised[start + 1 : start + length]
        ids = np.array(tokens.ids, dtype=np.int32)
        return Example(ids, spans, fate, int(tokens.bytes[targets].sum()), tokens.supervised, cut=tuple(gone.items()))

    def _shortened(self, values: tuple[str, ...], tokens: _Tokens) -> tuple[_Tokens, dict[str, int]]:
        """A row that fits, and the tokens cut from each of its fields.

        The longest field of the prompt loses its end, so that the response stays whole. A conversation loses its end,
        and so does a response that is too long by itself: cut off, it has no end of turn, so that nobody learns to
        stop there.
        """
        gone: dict[str, int] = {}
        names = [column.name for column in self.columns]
        while self.wording is not None and (excess := len(tokens.ids) - self.max_tokens) > 0:
            cuttable = [name for name in self.wording.prompt_columns if name not in self.wording.response_columns]
            fields = {
                name: encoder(self.tokenizer_json).tokenizer.encode(values[names.index(name)], add_special_tokens=False)
                for name in cuttable
            }
            longest = max(fields, key=lambda name: len(fields[name]), default=None)
            if longest is None or not len(fields[longest]):
                break
            place = names.index(longest)
            kept = max(0, len(fields[longest]) - excess)
            end = min(fields[longest].offsets[kept][0], len(values[place]) - 1) if kept else 0
            values = (*values[:place], values[place][:end], *values[place + 1 :])
            before = len(tokens.ids)
            (tokens,) = self._tokens([self._pieces(values)])
            gone[longest] = gone.get(longest, 0) + before - len(tokens.ids)
        if (excess := len(tokens.ids) - self.max_tokens) > 0:
            field = self.messages if self.wording is None else ", ".join(self.wording.response_columns)
            gone[field] = excess
        return tokens.first(self.max_tokens), gone

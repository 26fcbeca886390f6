"""The prompts of a certificate: words of the validation split, put as the task puts them.

Each kind can show another fault: conversations the template, texts the tokenizer and what it puts before them, token
ids just before the end of an answer whether the model stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distft.certificate.record import BEYOND_STOP, NEW_TOKENS, Ask
from distft.data.example import Task
from distft.data.store import Prepared
from distft.errors import DataError
from distft.task.classification import Classification
from distft.task.encoder import encoder
from distft.task.generation import Generation
from distft.task.language_modeling import LanguageModeling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextTask = Classification | Generation | LanguageModeling

PROMPTS = 8
"""Prompts that are made of the data, at least; fewer only where the data has not the words."""

PROBE = "In 1790 and 2024: naïve café, 東京 🙂\n\n\tprint( x )  1234567 %"
"""What tokenizers that are almost the same differ in: digits, spaces, accents, letters of several bytes."""

_ROWS = 64  # that are looked at, of each split
_TOKENS = 192  # of a prompt
_BUDGETS = (96, 48, 24, 12, 6)  # tokens of a message or text: the first with which enough prompts fit
_ENDINGS = 4
_TURNS = ("user", "assistant", "user")
_ROLES = (("user",), _TURNS, ("user",), ("system", "user"), ("user",), ("user",), ("system", *_TURNS), ("user",))


@dataclass(frozen=True)
class Asks:
    """What a certificate asks.

    Attributes:
        prompts: Conversations or texts.
        endings: Ids of prompts with all of the data's answer but its end: the model may say that it ends here.
        new_tokens: The most tokens of an answer that the model's context has place for.
    """

    prompts: tuple[Ask, ...]
    endings: tuple[Ask, ...] = ()
    new_tokens: int = NEW_TOKENS


@dataclass(frozen=True, eq=False)
class _Segment:
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    @property
    def answer(self) -> slice:
        """The last stretch of targets."""
        last = int(np.flatnonzero(self.supervised)[-1]) + 1
        first = int(np.flatnonzero(~self.supervised[:last])[-1]) + 1
        return slice(first, last)


def asks(task: Task, prepared: Prepared, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Asks:
    """The prompts of a run's certificate: of validation, and of training where that has too few.

    Args:
        task: The job's task, with the tokenizer that it was trained with.
        prepared: The run's data.
        tokenizer: The same tokenizer.
        context: Tokens that the model reads at most; None for any number.
    """
    most = _TOKENS if context is None else min(_TOKENS, context // 2)
    new_tokens = NEW_TOKENS if context is None else min(NEW_TOKENS, context - most - BEYOND_STOP)
    assert isinstance(task, TextTask), "every task is one of these"
    segments = list(_segments(prepared))
    prompts: list[Ask] = []
    for budget in _BUDGETS:
        prompts = _distinct(_prompts(task, segments, tokenizer, budget), most)
        if len(prompts) == PROMPTS:
            break
    if isinstance(task, Classification):
        return Asks(tuple(prompts))
    texts = [PROBE, *(_cut(tokenizer, segment, 24) for segment in segments[:1])]
    probes = (Ask(_ids_of_text(task, text), text) for text in texts)
    prompts = _distinct((*prompts, *probes), most, PROMPTS + len(texts))
    known = {ask.ids for ask in prompts}
    endings = (ask for ask in _endings(task, segments, most) if ask.ids not in known)
    return Asks(tuple(prompts), tuple(islice(endings, _ENDINGS)), new_tokens)


def _distinct(made: Iterable[Ask], most: int, count: int = PROMPTS) -> list[Ask]:
    """The first so many that fit, each once."""
    found: dict[tuple[int, ...], Ask] = {}
    for ask in made:
        if 0 < len(ask.ids) <= most:
            found.setdefault(ask.ids, ask)
        if len(found) == count:
            break
    return list(found.values())


def _segments(prepared: Prepared) -> Iterator[_Segment]:
    """Those that validation, and then training, begins with."""
    for split in ("validation", "train"):
        rows = prepared.rows(split)
        for index in range(min(len(rows), _ROWS)):
            row = rows[index]
            for length, end in zip(row.segments, np.cumsum(row.segments).tolist(), strict=True):
                part = slice(end - length, end)
                if row.supervised[part].any():
                    yield _Segment(row.input_ids[part], row.supervised[part])


def _prompts(
    task: TextTask, segments: list[_Segment], tokenizer: PreTrainedTokenizerBase, budget: int
) -> Iterable[Ask]:
    if isinstance(task, Generation) and task.template is not None:
        return _conversations(task, segments, tokenizer, budget)
    if isinstance(task, Classification):
        texts = (tokenizer.decode(segment.ids[:-1][:budget], skip_special_tokens=True) for segment in segments)
    elif isinstance(task, Generation):
        texts = (
            tokenizer.decode(segment.ids[: segment.answer.start][-budget:], skip_special_tokens=True)
            for segment in segments
        )
    else:  # pieces of documents, of several lengths, so that there is something left to say
        longest = max((len(segment.ids) for segment in segments), default=0)
        texts = (
            _cut(tokenizer, segment, min(budget // 4 + 4 * (number % 8), 2 * len(segment.ids) // 3), start)
            for start in range(0, longest, budget)
            for number, segment in enumerate(segments)
        )
    return (Ask(_ids_of_text(task, text), text) for text in texts if text.strip())


def _cut(tokenizer: PreTrainedTokenizerBase, segment: _Segment, tokens: int, start: int = 0) -> str:
    """Some of a segment's words; a character of several tokens may be cut in two, and its rest is left out."""
    text: str = tokenizer.decode(segment.ids[start : start + tokens], skip_special_tokens=True)
    return text.strip("\ufffd \n")


def _ids_of_text(task: TextTask, text: str) -> tuple[int, ...]:
    """As in training: with what begins a text, without what ends one."""
    ((ids, _),) = encoder(task.tokenizer_json).encode([text])
    ends = not isinstance(task, Classification) and ids[-1:] == [task.end_of_text]
    return tuple(ids[:-1] if ends else ids)


def _conversations(
    task: Generation, segments: list[_Segment], tokenizer: PreTrainedTokenizerBase, budget: int
) -> Iterator[Ask]:
    """Longer conversations and questions in turns, all of the data's words; those the template refuses are left out."""
    said = []
    for segment in segments:
        ids = segment.ids[: segment.answer.start]
        asked = task.words_of(tokenizer.decode(ids)) or tokenizer.decode(ids, skip_special_tokens=True)
        answer = tokenizer.decode(segment.ids[segment.answer], skip_special_tokens=True)
        if asked.strip() and answer.strip():
            said.append((_shortened(tokenizer, asked, budget), _shortened(tokenizer, answer, budget)))
    for number in range(2 * PROMPTS if said else 0):
        pairs = (said[(number + turn) % len(said)] for turn in range(4))
        messages = [
            {"role": role, "content": answer if role == "assistant" else asked}
            for role, (asked, answer) in zip(_ROLES[number % len(_ROLES)], pairs, strict=False)
        ]
        with suppress(DataError):
            yield Ask(tuple(task.conversation_ids(messages)), messages=tuple(messages))


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens])).strip("\ufffd")


def _endings(task: Generation | LanguageModeling, segments: list[_Segment], most: int) -> Iterator[Ask]:
    """Prompts with the data's answer, or documents' last tokens; without the token that ends them."""
    for segment in segments:
        ids = segment.ids[: segment.answer.stop]
        if isinstance(task, Generation):
            if len(ids) <= most:
                yield Ask(tuple(ids[:-1].tolist()))
        elif ids[-1] == task.end_of_text:
            yield Ask(tuple(ids[-min(most, 64) : -1].tolist()))

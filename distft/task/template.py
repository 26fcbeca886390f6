"""Chat templates: conversations as the text that a server would send, cut where the model's turns begin.

A template is asked for the conversation up to a turn twice: with the opening of an answer, and with the answer. What
the second adds to the first is what the model has to write, whatever the template looks like; templates need no
``{% generation %}`` markers, which few have.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from distft.errors import DataError

DATE = datetime.date(2025, 1, 1)
"""What "today" is to templates that write the date: with the real one, tomorrow's rows would be others."""

_TODAY = re.compile(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""")
_MARKERS = r"<\|[^|<>]*\|>|</?[a-z_]+>|<</?[A-Z]+>>|\[/?[A-Z_]+\]"
_ROLES = "system|user|assistant|model|human|gpt|bot|tool"
_ASSISTANT = "assistant"
_SHOWN = 60

Message = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""


class Piece(NamedTuple):
    """A stretch of a conversation's text.

    Attributes:
        text: What it says.
        answer: Whether the model has to write it.
    """

    text: str
    answer: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with all it needs, as plain values that travel to other processes.

    Attributes:
        source: The template, in Jinja.
        special: The names and texts of the special tokens that it may write, such as ("bos_token", "<s>").
        stops: The texts of the tokens that stop generation.
        added: Words that it writes into a conversation between a user and the assistant, which neither wrote.
        answers: What it writes into the assistant's last answer, such as an empty thought: the model learns it too.
        leaves_out: Roles whose messages it leaves out without a word.
        rewrites: Whether it writes an earlier turn of the assistant otherwise than the last.
        dated: Whether it writes today's date, which is always :data:`DATE` here.
    """

    source: str
    special: tuple[tuple[str, str], ...]
    stops: tuple[str, ...]
    added: tuple[str, ...] = ()
    answers: str = ""
    leaves_out: tuple[str, ...] = ()
    rewrites: bool = False
    dated: bool = False

    @classmethod
    def of(cls, tokenizer: Any, stops: Sequence[int]) -> ChatTemplate | None:
        """The template of a transformers tokenizer, or None where it has none.

        Args:
            tokenizer: The tokenizer.
            stops: The ids that stop generation.

        Raises:
            DataError: It cannot render a question and its answer.
        """
        if not tokenizer.chat_template:
            return None
        given = tokenizer.get_chat_template()
        source = undated(given)
        special = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
        ends = tuple(tokenizer.convert_ids_to_tokens(list(stops)))
        bare = cls(source, special, ends)
        return cls(
            source,
            special,
            ends,
            _added(bare, list(tokenizer.get_added_vocab())),
            _added_to_answers(bare),
            tuple(role for role in ("system", "tool") if _leaves_out(bare, role)),
            _rewrites(bare),
            source != given,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the data card says of it."""
        facts: dict[str, Any] = {"adds": list(self.added)}
        if self.answers:
            facts["adds_to_answers"] = self.answers
        if self.dated:
            facts["date"] = f"the template writes today's date; here it is always {DATE.isoformat()}"
        if self.leaves_out:
            facts["leaves_out"] = list(self.leaves_out)
        if self.rewrites:
            facts["targets"] = "the template rewrites earlier turns: only the last answer of a conversation is a target"
        return facts

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A conversation up to its last answer, context and answers in turns; joined, they are its text.

        An answer ends with the token that ends its turn. Messages after the last answer are no context of any, and an
        empty answer (the call of a tool, often) is nothing to learn. Where the template writes an earlier answer
        otherwise once the conversation goes on (Qwen3 drops its thoughts), a server never sends what was learnt for
        it: only the last answer counts then.

        Raises:
            DataError: The template refuses the conversation, changes the text before an answer with the answer, or
                ends an answer without a token that stops generation.
        """
        turns = answered(messages)
        if not turns:
            return [Piece(self._render(messages, opening=False), False)]
        answers = [self._answer(messages, turn) for turn in turns]
        before, answer = answers[-1]
        whole = before + answer
        ends = [0, *(len(before) + len(answer) for before, answer in answers)]
        grows = all(
            whole.startswith(before + answer) and end <= len(before)
            for end, (before, answer) in zip(ends, answers, strict=False)
        )
        if not grows:
            return [Piece(before, False), Piece(answer, True)]
        result = []
        for end, (before, answer) in zip(ends, answers, strict=False):
            result += [Piece(before[end:], False), Piece(answer, True)]
        return result

    def _answer(self, messages: Sequence[Message], turn: int) -> tuple[str, str]:
        """The text before the answer of a turn, and the answer with its end of turn."""
        before = self._render(messages[:turn], opening=True)
        until = self._render(messages[: turn + 1], opening=False)
        if not until.startswith(before):
            raise _refused(
                f"the chat template changes what stands before an answer (message {turn + 1}) once the answer is "
                f"there: {_difference(before, until)}",
                messages,
                "no server sends what would be learnt; give the tokenizer a chat_template whose text only grows",
            )
        answer = until[len(before) :]
        ends = [answer.index(stop) + len(stop) for stop in self.stops if stop in answer]
        if not ends:
            raise _refused(
                f"the chat template ends an answer without a token that stops generation: {answer[-_SHOWN:]!r}",
                messages,
                'name what ends a turn as "eos_token" in tokenizer_config.json; else the model would never stop',
            )
        return before, answer[: min(ends)]

    def opening(self, messages: Sequence[Message]) -> str:
        """A conversation up to where the assistant's next words begin.

        Raises:
            DataError: The template refuses the conversation.
        """
        return self._render(messages, opening=True)

    def _render(self, messages: Sequence[Message], *, opening: bool) -> str:
        """The text of a conversation; with ``opening``, up to where the assistant's next words begin."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.source,
                add_generation_prompt=opening,
                **dict(self.special),
            )
        except (TemplateError, TypeError, ValueError) as error:
            fix = "change the conversation, or the tokenizer's chat_template"
            raise _refused(f"the chat template refuses a conversation: {error}", messages, fix) from error
        return str(text)


def undated(source: str) -> str:
    """A template that writes :data:`DATE` where it wrote today's."""
    return _TODAY.sub(lambda match: json.dumps(DATE.strftime(match["format"])), source)


def answered(messages: Sequence[Message]) -> list[int]:
    """The places of the assistant's turns that say something."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] == _ASSISTANT and message["content"].strip()
    ]


def _refused(what: str, messages: Sequence[Message], fix: str) -> DataError:
    start = next((message["content"] for message in messages if message["role"] != "system"), "")
    shown = start if len(start) <= _SHOWN else f"{start[:_SHOWN]}..."
    return DataError(f"{what}; the conversation begins {shown!r}", fix=fix)


def _difference(expected: str, found: str) -> str:
    place = next((at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), len(found))
    return f"{expected[place : place + _SHOWN]!r} becomes {found[place : place + _SHOWN]!r}"


_USER, _ANSWER, _OTHER = "7questionq7", "7answerq7", "7otherq7"  # words that no template holds
_EXCHANGE = ({"role": "user", "content": _USER}, {"role": _ASSISTANT, "content": _ANSWER})


def _added(template: ChatTemplate, tokens: Sequence[str]) -> tuple[str, ...]:
    """Words outside contents, special tokens and the names of roles."""
    text = template._render(_EXCHANGE, opening=False)
    known = sorted({*tokens, *(token for _, token in template.special), _USER, _ANSWER}, key=len, reverse=True)
    stretches = re.split("|".join([*map(re.escape, filter(None, known)), _MARKERS]), text)
    unnamed = (re.sub(rf"^\s*({_ROLES})\s*(:|\n|$)", "", stretch, flags=re.IGNORECASE) for stretch in stretches)
    return tuple(dict.fromkeys(stretch.strip() for stretch in unnamed if re.search(r"\w", stretch)))


def _added_to_answers(template: ChatTemplate) -> str:
    try:
        answer = template.pieces(_EXCHANGE)[-1].text
    except DataError:
        return ""  # it says so itself, with the first row
    for known in (_ANSWER, *template.stops, *(token for _, token in template.special)):
        answer = answer.replace(known, "")
    return re.sub(rf"^({_ROLES})\s*:?$", "", answer.strip())


def _leaves_out(template: ChatTemplate, role: str) -> bool:
    other = {"role": role, "content": _OTHER}
    messages = [other, *_EXCHANGE] if role == "system" else [*_EXCHANGE, other, _EXCHANGE[1]]
    try:
        return _OTHER not in template._render(messages, opening=False)
    except DataError:
        return False  # it says so itself, where a conversation has one


def _rewrites(template: ChatTemplate) -> bool:
    try:
        return len(template.pieces([*_EXCHANGE, *_EXCHANGE])) < 4
    except DataError:
        return False

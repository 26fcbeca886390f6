"""What a client gets: OpenAI's objects, whole or as the chunks of a stream, made of a service's pieces.

Shapes: https://platform.openai.com/docs/api-reference/completions and .../chat; ``token_ids`` and ``prompt_token_ids``
are vLLM's names, told where they are asked for.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from distft.serving.protocol import ApiError, Delta, Finish, Judgement, Model, Question, Token


class Usage(TypedDict):
    """How many tokens were read and written; each prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(TypedDict):
    """Log-probabilities (nats) of a completion, place by place; ``text_offset`` counts characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(TypedDict):
    """One token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token of a chat's answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat's answer."""

    content: list[TokenLogprob]


class Answered(TypedDict):
    """What all choices tell."""

    index: int
    finish_reason: Finish | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class TextChoice(Answered):
    """One completion."""

    text: str
    logprobs: TextLogprobs | None


class Said(TypedDict):
    """A message of the assistant's, or what a chunk adds to it."""

    role: NotRequired[Literal["assistant"]]
    content: str


class ChatChoice(Answered):
    """One answer of a chat; a stream's chunks have ``delta`` in place of ``message``."""

    message: NotRequired[Said]
    delta: NotRequired[Said]
    logprobs: ChatLogprobs | None


class Reply(TypedDict):
    """What completions and chats share."""

    id: str
    created: int
    model: str
    usage: NotRequired[Usage | None]


class TextReply(Reply):
    """Completions, or a chunk of them."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatReply(Reply):
    """Answers of a chat, or a chunk of them."""

    object: Literal["chat.completion", "chat.completion.chunk"]
    choices: list[ChatChoice]


class ModelCard(TypedDict):
    """A model that answers; the last four are ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: str
    context: int | None
    chat: bool
    ready: bool


class ModelCards(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


class Judged(TypedDict):
    """What a classifier says of one text."""

    index: int
    label: str
    probabilities: dict[str, float]


class Judgements(TypedDict):
    """What it says of all of them."""

    object: Literal["list"]
    model: str
    data: list[Judged]
    usage: Usage


class Fault(TypedDict):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Faulty(TypedDict):
    """Every error, whatever its status."""

    error: Fault


@dataclass
class _Answer:
    """How far one answer is told: characters that its tokens made, whole ones only."""

    characters: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))


class Teller:
    """Tells one request's pieces in OpenAI's words, as :class:`TextReply` or :class:`ChatReply`.

    Args:
        question: The request.
    """

    def __init__(self, question: Question) -> None:
        self._question, self._chat = question, question.messages is not None
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._answers: dict[int, _Answer] = {}
        self._read = self._written = 0

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """A stream's next chunk; None where a piece has nothing to say."""
        first = delta.index not in self._answers
        choice = self._choice(delta)
        if not (first or delta.text or delta.tokens or delta.finish):
            return None
        if self._chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": delta.text}
        return {**self._reply([choice], "chat.completion.chunk"), "usage": None}

    def last(self) -> dict[str, Any]:
        """The chunk that tells the usage, after all others."""
        return {**self._reply([], "chat.completion.chunk"), "usage": self._usage()}

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """All answers in one object."""
        pieces: dict[int, list[Delta]] = {}
        for delta in deltas:
            pieces.setdefault(delta.index, []).append(delta)
        choices = []
        for index in sorted(pieces):
            answer = _joined(pieces[index])
            choice = self._choice(answer)
            if self._chat:
                choice["message"] = {"role": "assistant", "content": answer.text}
            choices.append(choice)
        return {**self._reply(choices, "chat.completion"), "usage": self._usage()}

    def _usage(self) -> Usage:
        total = self._read + self._written
        return Usage(prompt_tokens=self._read, completion_tokens=self._written, total_tokens=total)

    def _reply(self, choices: list[dict[str, Any]], chat: str) -> dict[str, Any]:
        kind = chat if self._chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._question.model,
            "choices": choices,
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        """A piece without its text where that is a chat's; counts its tokens."""
        answer = self._answers.setdefault(delta.index, _Answer())
        self._read += delta.prompt_tokens if delta.index % self._question.n == 0 else 0
        self._written += delta.new_tokens
        told: dict[str, Any] = {"index": delta.index, "logprobs": None, "finish_reason": delta.finish}
        if self._question.sampling.top_logprobs is not None and delta.tokens:
            told["logprobs"] = _chat_logprobs(delta) if self._chat else _text_logprobs(delta, answer)
        if self._question.ids:
            told["token_ids"] = [token.id for token in delta.tokens]
            if delta.prompt_ids is not None:
                told["prompt_token_ids"] = list(delta.prompt_ids)
        return told if self._chat else {**told, "text": delta.text}


def _joined(deltas: Sequence[Delta]) -> Delta:
    """The pieces of one answer as one."""
    return Delta(
        index=deltas[0].index,
        text="".join(each.text for each in deltas),
        tokens=tuple(token for each in deltas for token in each.tokens),
        spelling={id: text for each in deltas for id, text in each.spelling.items()},
        finish=deltas[-1].finish,
        prompt_ids=deltas[0].prompt_ids,
        prompt_tokens=deltas[0].prompt_tokens,
        new_tokens=sum(each.new_tokens for each in deltas),
    )


def _word(id: int, spelling: Mapping[int, bytes]) -> str:
    """A token as text, where a part of a character is a replacement sign, and an unknown one its number."""
    return spelling[id].decode("utf-8", "replace") if id in spelling else f"token_id:{id}"


def _text_logprobs(delta: Delta, answer: _Answer) -> TextLogprobs:
    told = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in delta.tokens:
        told["tokens"].append(_word(token.id, delta.spelling))
        told["token_logprobs"].append(_number(token.logprob))
        top: dict[str, float] = {}
        for id, logprob in token.top:  # several parts of characters look the same: the likeliest of them is told
            top.setdefault(_word(id, delta.spelling), _number(logprob))
        told["top_logprobs"].append(top)
        told["text_offset"].append(answer.characters)
        answer.characters += len(answer.decoder.decode(delta.spelling.get(token.id, b"")))
    return told


def _chat_logprobs(delta: Delta) -> ChatLogprobs:
    def one(id: int, logprob: float | None) -> TopLogprob:
        known = list(delta.spelling[id]) if id in delta.spelling else None
        return TopLogprob(token=_word(id, delta.spelling), logprob=_number(logprob), bytes=known)

    def place(token: Token) -> TokenLogprob:
        return TokenLogprob(**one(token.id, token.logprob), top_logprobs=[one(*each) for each in token.top])

    return ChatLogprobs(content=[place(token) for token in delta.tokens])


def _number(logprob: float | None) -> float:
    """JSON knows no infinity; OpenAI tells -9999 for what is as good as impossible."""
    return -9999.0 if logprob is None or not logprob > -9999.0 else logprob


def card(model: Model) -> ModelCard:
    """A model as ``/v1/models`` tells it."""
    return ModelCard(
        id=model.name,
        object="model",
        created=model.created,
        owned_by="distft",
        kind=model.kind,
        context=model.context,
        chat=model.chat,
        ready=model.ready,
    )


def judgements(model: str, found: Sequence[Judgement]) -> Judgements:
    """What ``/v1/classify`` tells."""
    read = sum(each.tokens for each in found)
    return Judgements(
        object="list",
        model=model,
        data=[
            Judged(index=index, label=each.label, probabilities=each.probabilities) for index, each in enumerate(found)
        ],
        usage=Usage(prompt_tokens=read, completion_tokens=0, total_tokens=read),
    )


def faulty(error: ApiError) -> Faulty:
    """An error's body."""
    return Faulty(error=Fault(message=error.message, type=error.type, param=error.param, code=error.code))

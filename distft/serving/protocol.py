"""What the parts of serving say to one another: plain frozen data, which crosses processes.

T: tokens of an answer. V: size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Why an answer ended: the model or a stop string ended it, or a limit did.
Finish = Literal["stop", "length"]


class ApiError(Exception):
    """A request that is answered with an error, in OpenAI's shape.

    Args:
        status: The HTTP status.
        message: What is wrong, with the value that is wrong, and what to do.
        type: OpenAI's class of the error, such as ``invalid_request_error``.
        code: What a program can go by, such as ``context_length_exceeded``.
        param: The field of the request that it concerns.
        retry_after: Seconds after which the same request may succeed (429 and 503).
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message, type, code, param, retry_after)
        self.status, self.message, self.type = status, message, type
        self.code, self.param, self.retry_after = code, param, retry_after


@dataclass(frozen=True)
class Sampling:
    """How tokens of one answer are chosen.

    Attributes:
        max_new_tokens: The most tokens, the one that ends the answer included.
        temperature: 0 always takes the likeliest token.
        top_p: The smallest set of likeliest tokens with this probability together is drawn from.
        frequency_penalty: Taken from a token's logit for each time that the answer has it already.
        presence_penalty: Taken once where the answer has it already.
        seed: Of the draws: the same seed, prompt and device give the same answer, whatever else is being written.
        top_logprobs: How many of the likeliest tokens are told at each place; None tells no log-probabilities at all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        id: Its id; an id that ends the answer is its last token.
        logprob: Its log-probability (nats) under the model, temperature, penalties and top-p left out; None unless
            asked for.
        top: The likeliest ids there with theirs, likeliest first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Engine(Protocol):
    """What writes tokens, many answers at a time."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens that the model reads at most, prompt and answer together."""
    stop_ids: tuple[int, ...]
    """The ids that end an answer."""
    dtype: str
    """The dtype of the weights: ``bf16`` or ``fp32``."""

    @property
    def failure(self) -> str | None:
        """Why it writes no more; None while it does."""

    def write(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Token]]:
        """The tokens of one answer as they come, one or several at a time.

        It ends after an id of ``stop_ids`` or after ``max_new_tokens``. Closing the generator (``aclose``) cancels the
        answer: its place is free within a second.

        Args:
            prompt: Token ids, at least one; together with ``max_new_tokens`` within the context.
            sampling: How tokens are chosen.

        Raises:
            ApiError: 500 where the engine failed.
        """

    def busy(self) -> int:
        """Answers that are being written, or wait for a place in the batch."""

    async def close(self) -> None:
        """Frees the model; answers that are being written end with an error."""


@dataclass(frozen=True)
class Delta:
    """A piece of one answer.

    Attributes:
        index: Which of the request's ``n`` answers (and prompts, as OpenAI numbers them) it belongs to.
        text: What it adds to the answer; may be empty.
        tokens: The tokens that it is made of, in order, where log-probabilities or ids were asked for.
        spelling: The bytes of each id that ``tokens`` names, the likeliest ones included, where log-probabilities were
            asked for: only the service has the tokenizer. A special token has those of its name.
        finish: Why the answer ended, with its last piece.
        prompt_ids: The prompt's ids, with the first piece, where ids were asked for.
        prompt_tokens: With the first piece: how long the prompt is.
        new_tokens: How many tokens the model wrote for this piece.
    """

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    spelling: Mapping[int, bytes] = field(default_factory=dict)
    finish: Finish | None = None
    prompt_ids: tuple[int, ...] | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Question:
    """One request for text, checked as far as that is possible without the model.

    Attributes:
        model: A name of :meth:`Service.models`.
        prompts: Texts or token ids to continue; empty for a chat.
        messages: A conversation for the model's template; None for completions.
        sampling: ``max_new_tokens`` 0 stands for as many as the server and the context allow; the seed is that of the
            first answer.
        n: Answers for each prompt.
        stop: Texts that end an answer; they are not part of it.
        ids: Whether token ids are told.
        echo: Whether the prompt's text comes before the answer's (completions only).
        stream: Whether somebody reads along; else all pieces may come at the end.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, Any], ...] | None = None
    sampling: Sampling = Sampling(0)
    n: int = 1
    stop: tuple[str, ...] = ()
    ids: bool = False
    echo: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Judgement:
    """What a classifier says of one text.

    Attributes:
        label: The likeliest label.
        probabilities: Of every label; they add up to 1.
        tokens: How long the text is.
    """

    label: str
    probabilities: dict[str, float]
    tokens: int


@dataclass(frozen=True)
class Model:
    """One model that answers.

    Attributes:
        name: What requests call it.
        kind: The job's ``task.kind``.
        created: Seconds since the epoch: when it was exported.
        context: Tokens that it reads at most; None where its configuration does not say.
        chat: Whether it has a template for conversations.
        ready: Whether a replica of it has proved that it is the trained one; a model that was let go while nobody asks
            stays ready.
        running: Whether there is such a replica now.
    """

    name: str
    kind: str
    created: int
    context: int | None
    chat: bool
    ready: bool = True
    running: bool = True


class Service(Protocol):
    """What the HTTP API asks: models by name, wherever they are."""

    def models(self) -> list[Model]:
        """Those there are, ready or not."""

    def answer(self, question: Question) -> AsyncGenerator[Delta]:
        """The pieces of all answers, interleaved as they come; closing the generator cancels them.

        Raises:
            ApiError: Before the first piece: 404 no such model, 400 too long or no template, 429 no place to wait,
                503 no replica. Later: 500 or 503 where a replica failed in the middle.
        """

    async def classify(self, model: str, texts: Sequence[str]) -> list[Judgement]:
        """The labels of some texts.

        Raises:
            ApiError: As above; 400 where the model is no classifier.
        """

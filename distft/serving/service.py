"""The models of this process, behind :class:`~.protocol.Service`."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence, Set
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from distft.errors import RunError
from distft.model.decoding import Spelling
from distft.serving.classifier import Classifier
from distft.serving.prompts import Prompts
from distft.serving.protocol import ApiError, Delta, Engine, Judgement, Model, Question, Sampling, Token
from distft.serving.text import AnswerText

#: The weight of the last request in the estimate of how long one takes.
_LAST = 0.2


class _Places:
    """Places for answers that are written or wait; how soon one is free is estimated by Little's law.

    Args:
        most: How many there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._seconds = 1.0  # that a request takes, waiting counted

    @contextmanager
    def taken(self, places: int) -> Iterator[None]:
        """So many of them, until the context ends.

        Raises:
            ApiError: 429 where there are too few now, 400 where there never are.
        """
        if places > self._most:
            raise ApiError(400, f"{places} answers were asked for at once; the most is {self._most}", param="n")
        if (missing := self._taken + places - self._most) > 0:
            raise ApiError(
                429,
                f"{self._taken} answers are being written or wait, and {self._most} may; ask again later",
                "rate_limit_error",
                code="overloaded",
                retry_after=max(1.0, round(missing * self._seconds / self._taken, 1)),
            )
        self._taken += places
        start = time.monotonic()
        try:
            yield
            self._seconds += _LAST * (time.monotonic() - start - self._seconds)
        finally:
            self._taken -= places


class Writer:
    """A model that writes text.

    Args:
        model: What is said of it.
        engine: What writes its tokens.

    Raises:
        DataError: The tokenizer is of the slow kind, or has no end of text.
    """

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model = dataclasses.replace(model, context=engine.context)
        self.engine = engine
        self._prompts, self._spelling = Prompts(engine.tokenizer), Spelling(engine.tokenizer)

    def prompts(self, question: Question) -> list[tuple[int, ...]]:
        """The ids of the question's prompts."""
        if question.messages is not None:
            return [self._prompts.of_chat(question.messages)]
        return [self._prompts.of_text(one) if isinstance(one, str) else one for one in question.prompts]

    def limit(self, prompt: Sequence[int], asked: int, most: int) -> int:
        """The most tokens of an answer.

        Args:
            prompt: What stands before it.
            asked: So many were asked for; 0 for as many as may be.
            most: So many may be.

        Raises:
            ApiError: 400 where they do not fit.
        """
        room = self.engine.context - len(prompt)
        if asked > most:
            raise ApiError(400, f"max_tokens is {asked}; the most is {most}", param="max_tokens")
        if room < max(asked, 1):
            raise ApiError(
                400,
                f"This model's maximum context length is {self.engine.context} tokens. However, {len(prompt)} tokens "
                f"are in the prompt and {max(asked, 1)} are asked for. Please reduce the length of either.",
                code="context_length_exceeded",
                param="prompt",
            )
        return asked or min(most, room)

    async def write(
        self, question: Question, index: int, prompt: tuple[int, ...], sampling: Sampling
    ) -> AsyncGenerator[Delta]:
        """The pieces of one answer."""
        goes_on = () if question.messages is not None else prompt
        text = AnswerText(self.engine.tokenizer, self.engine.stop_ids, question.stop, goes_on)
        asked = question.prompts[index // question.n] if question.echo and question.prompts else ""
        before = asked if isinstance(asked, str) else str(self.engine.tokenizer.decode(asked))
        told, left = question.ids or sampling.top_logprobs is not None, sampling.max_new_tokens
        first = Delta(
            index, prompt_ids=prompt if question.ids else None, prompt_tokens=len(prompt)
        )  # what only the first piece says
        async with aclosing(self.engine.write(prompt, sampling)) as written:
            async for tokens in written:
                shown, used = text.add([token.id for token in tokens])
                left -= used
                over = text.stopped or left <= 0
                piece = before + shown + (text.end() if over else "")
                yield dataclasses.replace(
                    first,
                    text=piece,
                    tokens=tuple(tokens[:used]) if told else (),
                    spelling=self._spelled(tokens[:used]) if sampling.top_logprobs is not None else {},
                    finish=("stop" if text.stopped else "length") if over else None,
                    new_tokens=used,
                )
                if over:
                    return
                first, before = Delta(index), ""

    def _spelled(self, tokens: Sequence[Token]) -> dict[int, bytes]:
        named = {token.id for token in tokens} | {id for token in tokens for id, _ in token.top}
        return {id: self._spelling(id) for id in named}


@dataclass(frozen=True)
class Judge:
    """A model that tells labels.

    Attributes:
        model: What is said of it.
        classifier: What tells them.
    """

    model: Model
    classifier: Classifier


class LocalService:
    """See :class:`~.protocol.Service`.

    Args:
        models: Those that answer.
        max_new_tokens: The most tokens of one answer.
        most: Of each model, answers that are written or wait at the same time.
    """

    def __init__(self, models: Sequence[Writer | Judge], *, max_new_tokens: int, most: int) -> None:
        self._models: dict[str, Writer | Judge] = {one.model.name: one for one in models}
        self._places = defaultdict[str, _Places](lambda: _Places(most))
        self._max_new_tokens = max_new_tokens

    @property
    def names(self) -> Set[str]:
        """Of the models."""
        return self._models.keys()

    def put(self, one: Writer | Judge) -> None:
        """One more model; requests for it are answered from now on."""
        self._models[one.model.name] = one

    def drop(self, name: str) -> None:
        """One model less; who reads an answer of its reads on."""
        del self._models[name]

    def models(self) -> list[Model]:
        """See :meth:`.protocol.Service.models`."""
        return [dataclasses.replace(one.model, ready=_failure(one) is None) for one in self._models.values()]

    def check(self) -> None:
        """Passes while every model answers.

        Raises:
            RunError: One has failed for good.
        """
        for name, one in self._models.items():
            if (failure := _failure(one)) is not None:
                raise RunError(f"the engine failed: {failure}", where=name)

    async def answer(self, question: Question) -> AsyncGenerator[Delta]:
        """See :meth:`.protocol.Service.answer`."""
        writer = self._find(question.model)
        if not isinstance(writer, Writer):
            raise ApiError(400, f"{question.model} is a classifier; ask /v1/classify", param="model")
        places, given = self._places[question.model], question.sampling
        with places.taken(question.n * max(1, len(question.prompts))):
            prompts = await asyncio.to_thread(writer.prompts, question)
            limits = [writer.limit(prompt, given.max_new_tokens, self._max_new_tokens) for prompt in prompts]
            answers = []
            for index in range(len(prompts) * question.n):
                number = index // question.n
                seed = (given.seed + index) % 2**63
                sampling = dataclasses.replace(given, max_new_tokens=limits[number], seed=seed)
                answers.append(writer.write(question, index, prompts[number], sampling))
            pieces = answers[0] if len(answers) == 1 else _together(answers)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    async def classify(self, model: str, texts: Sequence[str]) -> list[Judgement]:
        """See :meth:`.protocol.Service.classify`."""
        judge = self._find(model)
        if not isinstance(judge, Judge):
            raise ApiError(400, f"{model} writes text and tells no labels", param="model")
        with self._places[model].taken(1):
            return await judge.classifier.classify(texts)

    async def close(self) -> None:
        """Frees the models."""
        for one in self._models.values():
            await (one.engine.close() if isinstance(one, Writer) else one.classifier.close())

    def _find(self, name: str) -> Writer | Judge:
        if name not in self._models:
            raise ApiError(404, f"there is no model {name!r}", code="model_not_found", param="model")
        return self._models[name]


def _failure(one: Writer | Judge) -> str | None:
    return one.engine.failure if isinstance(one, Writer) else None


async def _together(answers: Sequence[AsyncGenerator[Delta]]) -> AsyncGenerator[Delta]:
    """The pieces of several answers as they come; where one fails, all end."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(1)  # a slow reader makes the engine gather tokens

    async def read(answer: AsyncGenerator[Delta]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    readers = [asyncio.create_task(read(answer)) for answer in answers]
    try:
        left = len(readers)
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

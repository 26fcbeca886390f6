"""A small service that needs no model: its answers are a hash of what was asked, at a pace that a test chooses."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import uvicorn

from distft.serving.api import create
from distft.serving.keys import Keys
from distft.serving.limits import Limits
from distft.serving.protocol import ApiError, Delta, Judgement, Model, Question, Token

KEY = "sk-0123456789abcdef"
CONTEXT = 256
LETTERS = "abcdefghijé "


@dataclass
class TinyService:
    """Tokens are the bytes of UTF-8.

    Attributes:
        pause: Seconds before each character.
        fault: Raised after three characters.
        ready: Whether its models are.
        running: Whether they have a replica.
        open: Answers that are being written.
        closed: How many were dropped before their end.
    """

    pause: float = 0.0
    fault: Exception | None = None
    ready: bool = True
    running: bool = True
    open: int = 0
    closed: int = 0
    asked: list[Question] = field(default_factory=list)

    def models(self) -> list[Model]:
        return [
            Model("parrot", "generation", 1_700_000_000, CONTEXT, chat=True, ready=self.ready, running=self.running),
            Model("org/plain", "language_modeling", 1_700_000_000, CONTEXT, chat=False),
            Model("judge", "classification", 1_700_000_000, CONTEXT, chat=False),
        ]

    async def answer(self, question: Question) -> AsyncGenerator[Delta]:
        self.asked.append(question)
        if question.messages is not None and question.model != "parrot":
            raise ApiError(400, "this model has no template", code="no_template", param="messages")
        told = (
            ["".join(f"{each['role']}:{each['content']};" for each in question.messages)] if question.messages else []
        )
        prompts = [each if isinstance(each, str) else bytes(i % 256 for i in each) for each in question.prompts] + told
        number = 0
        self.open += 1
        try:
            for prompt in prompts:
                ids = prompt.encode() if isinstance(prompt, str) else prompt
                if len(ids) + question.sampling.max_new_tokens > CONTEXT:
                    what = f"the prompt has {len(ids)} tokens; the context holds {CONTEXT}"
                    raise ApiError(400, what, code="context_length_exceeded", param="prompt")
                for _ in range(question.n):
                    async for delta in self._write(question, ids, number):
                        yield delta
                    number += 1
        except (GeneratorExit, asyncio.CancelledError):
            self.closed += 1
            raise
        finally:
            self.open -= 1

    async def _write(self, question: Question, ids: bytes, number: int) -> AsyncGenerator[Delta]:
        sampling = question.sampling
        seed = sampling.seed + number if sampling.temperature else 0
        most = sampling.max_new_tokens or CONTEXT - len(ids)
        draws = hashlib.shake_256(ids + str(seed).encode()).digest(most)
        text, tokens = "", 0
        for draw in draws:
            letter = LETTERS[draw % len(LETTERS)]
            if tokens + len(letter.encode()) > most:
                break
            text, tokens = text + letter, tokens + len(letter.encode())
        cut = min((text.index(stop) for stop in question.stop if stop in text), default=None)
        text, finish = (text, "length") if cut is None else (text[:cut], "stop")
        echo = ids.decode("utf-8", "replace") if question.echo else ""
        facts = {"prompt_ids": tuple(ids) if question.ids else None, "prompt_tokens": len(ids)}
        yield Delta(number, echo, **facts)
        for place, letter in enumerate(text):
            await asyncio.sleep(self.pause)
            if self.fault and place == 3:
                raise self.fault
            yield self._delta(question, number, letter)
        yield Delta(number, finish=finish)

    def _delta(self, question: Question, number: int, letter: str) -> Delta:
        told, most = letter.encode(), question.sampling.top_logprobs
        if most is None:
            tokens = tuple(Token(id) for id in told) if question.ids else ()
            return Delta(number, letter, tokens=tokens, new_tokens=len(told))
        likely = [*range(97, 97 + most)]
        tokens = tuple(Token(id, -0.5, tuple((other, -1.0) for other in likely)) for id in told)
        spelling = {id: bytes([id]) for id in (*told, *likely)}
        return Delta(number, letter, tokens=tokens, spelling=spelling, new_tokens=len(told))

    async def classify(self, model: str, texts: Sequence[str]) -> list[Judgement]:
        await asyncio.sleep(self.pause)
        if model != "judge":
            raise ApiError(400, f"{model} is no classifier", code="no_classifier", param="model")
        shares = [(len(text) % 10) / 10 for text in texts]
        return [
            Judgement("long" if share > 0.5 else "short", {"long": share, "short": 1 - share}, len(text))
            for text, share in zip(texts, shares, strict=True)
        ]


@contextmanager
def served(service: object, keys: Keys | None = None, limits: Limits | None = None) -> Iterator[SimpleNamespace]:
    """The API on a loopback port, over real HTTP; ``url``, ``app``."""
    app = create(service, keys or Keys.listed(f"alice:{KEY}"), limits)  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, app=app, service=service)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)

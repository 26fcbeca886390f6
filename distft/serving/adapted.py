"""Models that share the weights of one base: each is the base with an adapter of its own, or the base itself.

Adapters are small, but there may be many: one that nobody asks for can go, and is read and proved again when it is
asked for next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distft.certificate.shared import ADAPTER, has_adapter
from distft.errors import DistftError
from distft.log import logger
from distft.model import load_tokenizer, stop_ids
from distft.model.files import check_folder
from distft.model.mixed_adapters import Adapter, read_adapter
from distft.serving.protocol import ApiError, Delta, Judgement, Model, Question, Sampling, Token
from distft.serving.service import LocalService, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distft.serving.transformers_engine import TransformersEngine


class AdaptedEngine:
    """One adapter over an engine that others write with too; see :class:`~.protocol.Engine`.

    Args:
        engine: Made for adapters.
        tokenizer: The adapter's own: it may have another template.
        adapter: None: the base as it is.
    """

    def __init__(self, engine: TransformersEngine, tokenizer: PreTrainedTokenizerBase, adapter: Adapter | None) -> None:
        self._engine, self._adapter = engine, adapter
        self.tokenizer, self.stop_ids = tokenizer, tuple(stop_ids(tokenizer))
        self.context, self.dtype = engine.context, engine.dtype

    @classmethod
    def load(cls, engine: TransformersEngine, folder: Path) -> AdaptedEngine:
        """The engine of an export.

        Raises:
            DataError: Its adapter is not one of the engine's model, or the folder is not safe to load.
        """
        check_folder(folder)
        adapter = read_adapter(folder / ADAPTER, engine.model) if has_adapter(folder) else None
        return cls(engine, load_tokenizer(folder), adapter)

    @property
    def failure(self) -> str | None:
        """See :attr:`.protocol.Engine.failure`."""
        return self._engine.failure

    def write(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Token]]:
        """See :meth:`.protocol.Engine.write`."""
        return self._engine.write(prompt, sampling, self._adapter, self.stop_ids)

    def busy(self) -> int:
        """See :meth:`.protocol.Engine.busy`: answers of all adapters."""
        return self._engine.busy()

    async def close(self) -> None:
        """Nothing: the engine is others' too."""


@dataclass
class _Use:
    """How a model is used: by how many requests now, and when last."""

    requests: int = 0
    last: float = field(default_factory=time.monotonic)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class SharedService:
    """Models over one base; see :class:`~.protocol.Service`.

    Args:
        service: All of them, proved.
        engine: What they write with.
        load: Reads one again and proves it, in a thread; raises a DistftError where it cannot.
        adapters: Which of them may go while nobody asks.
    """

    def __init__(
        self,
        service: LocalService,
        engine: TransformersEngine,
        load: Callable[[str], Writer],
        adapters: Collection[str],
    ) -> None:
        self._service, self._engine, self._load = service, engine, load
        self._uses = {name: _Use() for name in adapters}

    def models(self) -> list[Model]:
        """See :meth:`.protocol.Service.models`: those that are in memory."""
        return self._service.models()

    def check(self) -> None:
        """See :meth:`.service.LocalService.check`."""
        self._service.check()

    async def answer(self, question: Question) -> AsyncGenerator[Delta]:
        """See :meth:`.protocol.Service.answer`."""
        async with self._held(question.model), aclosing(self._service.answer(question)) as pieces:
            async for piece in pieces:
                yield piece

    async def classify(self, model: str, texts: Sequence[str]) -> list[Judgement]:
        """See :meth:`.protocol.Service.classify`; none of them does."""
        return await self._service.classify(model, texts)

    def drop_idle(self, seconds: float) -> list[str]:
        """Lets the adapters go that nobody has asked for so long; their names."""
        since = time.monotonic() - seconds
        idle = [
            name
            for name, use in self._uses.items()
            if name in self._service.names and not use.requests and use.last <= since
        ]
        for name in idle:
            self._service.drop(name)
            logger.info("%s was let go: nobody asked for it for %.0f s", name, seconds)
        return idle

    async def close(self) -> None:
        """Frees the models and their base."""
        await self._engine.close()

    @asynccontextmanager
    async def _held(self, name: str) -> AsyncIterator[None]:
        """Keeps a model in memory; reads it where it is not there."""
        use = self._uses.get(name)
        if use is None:  # the base, or no model at all
            yield
            return
        use.requests += 1
        try:
            async with use.loading:
                if name not in self._service.names:
                    await self._read(name)
            yield
        finally:
            use.requests -= 1
            use.last = time.monotonic()

    async def _read(self, name: str) -> None:
        try:
            self._service.put(await asyncio.to_thread(self._load, name))
        except DistftError as error:
            logger.error("%s cannot be loaded again: %s", name, error)
            what = f"{name} could not be loaded again; this server's log says why"
            raise ApiError(503, what, "server_error", code="unavailable") from error

"""How requests pass: how many at once, for how long, and only while somebody waits for the answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distft.serving.metrics import Meters
from distft.serving.protocol import ApiError
from distft.serving.replies import faulty
from distft.serving.visits import fault

T = TypeVar("T")
_WAITING = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"
_GOODBYE_SECONDS = 1.0
#: Seconds after which a replica that was being started may be there.
_SOON = 10.0


class Gate:
    """So many requests at the same time, and so many that wait, first come first served; the others are sent away.

    Args:
        running: Requests at the same time.
        waiting: Requests that wait for one of them to end.
        meters: Where both numbers are told.
    """

    def __init__(self, running: int, waiting: int, meters: Meters) -> None:
        self._places, self._most_waiting = asyncio.Semaphore(running), waiting
        self._meters, self._at_once = meters, running
        self.running = self.waiting = 0
        self._usual_seconds = 1.0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a place, and gives it back.

        Raises:
            ApiError: 429, where too many wait already; it says when one of them should have been served.
        """
        if self._places.locked() and self.waiting >= self._most_waiting:
            seconds = self._usual_seconds * (self.waiting + 1) / self._at_once
            what = f"{self.running} requests are being answered and {self.waiting} wait: come back later"
            raise ApiError(429, what, "rate_limit_error", code="queue_full", retry_after=min(max(seconds, 1.0), 60.0))
        self.waiting += 1
        self._tell()
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
            self._tell()
        self.running += 1
        self._tell()
        start = time.monotonic()
        try:
            yield
        finally:
            self._places.release()
            self.running -= 1
            self._tell()
            self._usual_seconds += 0.1 * (time.monotonic() - start - self._usual_seconds)

    def _tell(self) -> None:
        self._meters.running.set(self.running)
        self._meters.waiting.set(self.waiting)


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does some work; cancels it when the client leaves.

    Args:
        receive: The connection's, whose body has been read.
        work: What to do.

    Raises:
        ClientDisconnect: The client has left; the work has ended.
    """

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def ticking(pieces: AsyncGenerator[T], seconds: float) -> AsyncGenerator[T | None]:
    """The same pieces, and None whenever none has come for some time; closing it closes them at once.

    One task reads them from first to last: time limits and the like inside a generator do not survive if each piece is
    asked for by another task (PEP 789).
    """
    ahead: asyncio.Queue[T | Exception | None] = asyncio.Queue(1)

    async def read() -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    await ahead.put(piece)
        except Exception as error:
            await ahead.put(error)
        else:
            await ahead.put(None)

    reading = asyncio.create_task(read())
    try:
        while True:
            try:
                async with asyncio.timeout(seconds):
                    piece = await ahead.get()
            except TimeoutError:
                yield None
                continue
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def gathered(pieces: AsyncGenerator[T], seconds: float) -> AsyncGenerator[list[T]]:
    """The same pieces in lists: the first as soon as it is there, later ones each so many seconds, the last at once.

    One task reads them, as above; what has come before an error is told before it.
    """
    found: list[T] = []
    some = asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    found.append(piece)
                    some.set()
        finally:
            some.set()

    reading = asyncio.create_task(read())
    try:
        while found or not reading.done():
            await some.wait()
            some.clear()
            if found:
                told = found.copy()
                found.clear()
                yield told
                await asyncio.wait((reading,), timeout=seconds)
        reading.result()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def overdue(seconds: float, *, running: bool) -> ApiError:
    """The error of a request that took too long, which asking again mends only where there was no replica."""
    if not running:
        return ApiError(
            503, f"no replica was there within {seconds:g} s", "server_error", code="starting", retry_after=_SOON
        )
    return ApiError(
        504, f"no answer within {seconds:g} s: ask for fewer tokens, or stream", "server_error", code="timeout"
    )


class Events(Response):
    """A stream of server-sent events that ends in ``[DONE]``.

    The status is told with the first event, so that errors before it are ordinary answers; later ones are events, and
    no ``[DONE]`` follows. Starlette's own response neither hears a client leave while nothing is sent (from version 2.4
    of ASGI on) nor closes its generator.

    Args:
        chunks: What the events say.
        seconds: The longest that all of it may take.
        quiet_seconds: After so long without a chunk comes a comment, so that nobody takes the connection for dead.
        late: Makes the error of a stream that took longer.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[Mapping[str, Any]],
        seconds: float,
        quiet_seconds: float,
        late: Callable[[], ApiError],
    ) -> None:
        super().__init__()
        self._chunks, self._seconds, self._quiet, self._late = chunks, seconds, quiet_seconds, late
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # nginx would hold events back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them while the client listens."""
        with suppress(ClientDisconnect):  # once the answer has begun, nobody else can say that the client left
            await while_there(receive, self._tell(scope, send))

    async def _tell(self, scope: Scope, send: Send) -> None:
        begun = False

        async def say(text: bytes) -> None:
            nonlocal begun
            if not begun:
                begun = True
                start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": text, "more_body": True})

        last = _DONE
        try:
            async with asyncio.timeout(self._seconds):
                async with aclosing(ticking(self._chunks, self._quiet)) as pieces:
                    async for piece in pieces:
                        await say(_WAITING if piece is None else _event(piece))
        except Exception as error:
            known = self._late() if isinstance(error, TimeoutError) else fault(error, scope)
            if not begun:
                raise known from error
            last = _event(faulty(known))
        with suppress(TimeoutError):  # a client that does not read cannot be told
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await say(last)
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(what: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(what, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"

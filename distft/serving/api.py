"""The HTTP API: OpenAI's, over any :class:`~.protocol.Service`.

:func:`create` makes an ordinary ASGI application, for uvicorn or for Ray Serve's ``@serve.ingress``: it needs no
lifespan, and all that it remembers belongs to the application object.
"""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from distft.serving.document import describe
from distft.serving.flow import Events, Gate, overdue, while_there
from distft.serving.keys import Allowance, Keys, Rates
from distft.serving.limits import Limits
from distft.serving.metrics import Meters
from distft.serving.protocol import ApiError, Delta, Model, Question, Service
from distft.serving.replies import Teller, card, judgements
from distft.serving.requests import B, Bodies, Chat, Completion, parsed
from distft.serving.visits import Reception, on_api_error, on_http_error, on_leaving, visit_of

PAGE = Path(__file__).parent / "page"
"""The folder of the page that people see at ``/``."""
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_BEARER = HTTPBearer(auto_error=False, description="An API key.")
_NOBODY = "anybody"
T = TypeVar("T")


def create(
    service: Service,
    keys: Keys | None,
    limits: Limits | None = None,
    page: Path | None = PAGE,
    *,
    loopback: bool = False,
) -> FastAPI:
    """The application.

    ``app.state.draining = True`` makes it refuse new requests (503) and say that it is not ready, while those that run
    finish; ``app.state.gate`` tells how many that are.

    Args:
        service: What answers.
        keys: Who may ask; None lets everybody.
        limits: What a request may take.
        page: A folder with an ``index.html`` to show at ``/``, where there is one.
        loopback: Whether it listens for this machine alone, and so refuses what is sent to another name (see
            :class:`~.visits.Reception`).
    """
    app = FastAPI(
        title="distft",
        version="1",
        summary="OpenAI's API over models that distft trained",
        docs_url=None,  # both pages of documentation load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go wherever the Host header says
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it would tell bodies to whoever set it up
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, ClientDisconnect: on_leaving},
    )
    desk = _Desk(app, service, keys, limits or Limits())
    app.state.draining, app.state.gate = False, desk.gate
    app.add_middleware(Reception, meters=desk.meters, loopback=loopback)
    entry = [Depends(desk.entry if keys else desk.everybody)]
    app.get("/healthz")(desk.healthz)
    app.get("/readyz")(desk.readyz)
    app.get("/metrics", dependencies=entry)(desk.metrics)
    app.get("/v1/models", dependencies=entry)(desk.models)
    app.get("/v1/models/{model:path}", dependencies=entry)(desk.model)
    app.post("/v1/completions", dependencies=entry)(desk.completions)
    app.post("/v1/chat/completions", dependencies=entry)(desk.chat)
    app.post("/v1/classify", dependencies=entry)(desk.classify)
    describe(app, desk.bodies)
    if page and (page / "index.html").is_file():
        _show(app, page)
    return app


class _Desk:
    """What the routes share."""

    def __init__(self, app: FastAPI, service: Service, keys: Keys | None, limits: Limits) -> None:
        self._app, self._service, self._keys, self._limits = app, service, keys, limits
        self.meters = Meters()
        self.gate = Gate(limits.running, limits.waiting, self.meters)
        self.bodies = Bodies.within(limits)
        self._allowances: dict[str, Allowance] = {}

    async def entry(
        self, request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> None:
        """Lets in who has a key."""
        owner = self._keys.owner(credentials.credentials) if self._keys and credentials else None
        if owner is None:
            said = "this API key is not known here" if credentials else "no API key: send `Authorization: Bearer KEY`"
            raise ApiError(401, said, code="invalid_api_key")
        visit_of(request).key = owner
        self._open(request)

    async def everybody(self, request: Request) -> None:
        """Lets everybody in."""
        visit_of(request).key = _NOBODY
        self._open(request)

    def _open(self, request: Request) -> None:
        if request.method == "POST" and self._app.state.draining:
            raise ApiError(503, "this server is stopping", "server_error", code="draining", retry_after=1)

    async def healthz(self) -> JSONResponse:
        """Whether the process answers at all."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> JSONResponse:
        """Whether every model has a replica that has proved itself."""
        models = self._service.models()
        ready = sum(model.ready for model in models)
        if self._app.state.draining:
            raise ApiError(503, "this server is stopping", "server_error", code="draining")
        if not models or ready < len(models):
            raise ApiError(503, f"{ready} of {len(models)} models are ready", "server_error", code="not_ready")
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Counters, for Prometheus."""
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> JSONResponse:
        """All models."""
        return JSONResponse({"object": "list", "data": [card(each) for each in self._service.models()]})

    async def model(self, model: str) -> JSONResponse:
        """One model."""
        return JSONResponse(card(self._model(model)))

    def _model(self, name: str) -> Model:
        for each in self._service.models():
            if each.name == name:
                return each
        raise ApiError(404, f"there is no model {name[:80]!r} here", code="model_not_found", param="model")

    async def completions(self, request: Request) -> Response:
        """Continues texts."""
        return await self._write(request, self.bodies.completion)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        return await self._write(request, self.bodies.chat)

    async def _write(self, request: Request, kind: type[Completion] | type[Chat]) -> Response:
        body = await self._body(request, kind)
        question = body.question(self._limits)
        self._admit(request, body.model)
        teller, pieces = Teller(question), self._pieces(request, question)
        if question.stream:
            chunks = _chunks(teller, pieces, usage=body.include_usage)
            late = partial(self._overdue, body.model)
            return Events(chunks, self._limits.seconds, self._limits.quiet_seconds, late)

        async def all_of_it() -> list[Delta]:
            async with aclosing(pieces):
                return [delta async for delta in pieces]

        return JSONResponse(teller.whole(await self._in_time(request, all_of_it())))

    async def classify(self, request: Request) -> Response:
        """Tells what labels texts have, and how probable each label is."""
        body = await self._body(request, self.bodies.classification)
        self._admit(request, body.model)

        async def judged() -> Any:
            async with self.gate.place():
                return await self._service.classify(body.model, body.texts)

        found = await self._in_time(request, judged())
        read = sum(each.tokens for each in found)
        visit = visit_of(request)
        self._allowance(visit.key).spend(read)
        self.meters.tokens.labels(visit.model, visit.key, "prompt").inc(read)
        return JSONResponse(judgements(body.model, found))

    async def _body(self, request: Request, kind: type[B]) -> B:
        """The body, read within its limits and checked."""
        limits = self._limits
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":  # a page elsewhere could send any other type without asking first
            raise ApiError(415, "send `Content-Type: application/json`", code="unsupported_media_type")
        too_large = ApiError(413, f"the body is larger than {limits.body_bytes:,} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body took over {limits.body_seconds:g} s", code="body_too_slow") from None
        return parsed(kind, bytes(body))

    def _admit(self, request: Request, model: str) -> None:
        """Counts a request that is sound."""
        visit = visit_of(request)
        visit.model = self._model(model).name
        self._allowance(visit.key).admit()

    def _allowance(self, key: str) -> Allowance:
        """What a key may still have, by its line in the file or else by the server's limits."""
        own, limits = self._keys.rates(key) if self._keys else Rates(), self._limits
        rates = Rates(own.requests or limits.requests_per_minute, own.tokens or limits.tokens_per_minute)
        known = self._allowances.get(key)
        if known is None or known.rates != rates:  # the file may have changed
            known = self._allowances[key] = Allowance(rates)
        return known

    async def _pieces(self, request: Request, question: Question) -> AsyncGenerator[Delta]:
        """The pieces of an answer, from when there is a place for it."""
        visit = visit_of(request)
        allowance = self._allowance(visit.key)
        async with self.gate.place():
            found = self.meters.timed(self._service.answer(question), visit.model, visit.key, visit.start)
            async with aclosing(found):
                async for delta in found:
                    allowance.spend(delta.prompt_tokens + delta.new_tokens)
                    yield delta

    async def _in_time(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await while_there(request.receive, work)
        except TimeoutError:
            raise self._overdue(visit_of(request).model) from None

    def _overdue(self, model: str) -> ApiError:
        return overdue(self._limits.seconds, running=self._model(model).running)


async def _chunks(teller: Teller, pieces: AsyncGenerator[Delta], *, usage: bool) -> AsyncGenerator[dict[str, Any]]:
    """What a stream's events say."""
    async with aclosing(pieces):
        async for delta in pieces:
            if chunk := teller.chunk(delta):
                yield chunk
    if usage:
        yield teller.last()


def _show(app: FastAPI, folder: Path) -> None:
    """Puts a folder's page at ``/`` and the files beside it under ``/page/``."""
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    async def shown(name: str = "index.html") -> Response:
        if name not in files:
            raise HTTPException(404)
        media = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(files[name], media_type=media, headers={"content-security-policy": _PAGE_POLICY})

    app.get("/", include_in_schema=False)(shown)
    app.get("/page/{name}", include_in_schema=False)(shown)

"""What every request gets, whatever becomes of it: an id, headers, an error in OpenAI's shape, a line in the log."""

from __future__ import annotations

import math
import re
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distft.log import logger
from distft.serving.metrics import Meters
from distft.serving.protocol import ApiError
from distft.serving.replies import faulty

GONE = 499
"""The status, told to nobody, of a request whose client left (nginx's number)."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_VISIT = "distft.visit"
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large"}


@dataclass
class Visit:
    """What is known of a request, for the log and the meters: names of ours, never what the client wrote.

    Attributes:
        id: The client's ``x-request-id`` where it sent a sound one, else a new one.
        start: When it came, in seconds of ``time.monotonic``.
        model: The model that it asks.
        key: Whose key it is.
        status: What it was answered.
    """

    id: str
    start: float = field(default_factory=time.monotonic)
    model: str = ""
    key: str = ""
    status: int = 0


def visit_of(request: Request) -> Visit:
    """What is known of a request."""
    visit: Visit = request.scope[_VISIT]
    return visit


class Reception:
    """ASGI middleware around the whole application.

    Args:
        app: What is inside.
        meters: Where requests are counted.
        loopback: Whether requests to names other than localhost are refused: a page in a browser here could have such
            a name resolved to 127.0.0.1, and then pass for one of this server's own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, meters: Meters, *, loopback: bool) -> None:
        self._app, self._meters, self._loopback = app, meters, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets one request in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        visit = scope[_VISIT] = Visit(asked if _ID.fullmatch(asked) else uuid.uuid4().hex)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = visit.id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if self._loopback and _is_elsewhere(Headers(scope=scope).get("host", "")):
                what = "this server is for its own machine, as localhost; a proxy before it has to send that Host"
                raise ApiError(421, what, code="misdirected_request")
            await self._app(scope, receive, told)
        except Exception as error:
            known = fault(error, scope)
            if not visit.status:
                await refusal(known)(scope, receive, told)
        finally:
            self._note(visit, scope)

    def _note(self, visit: Visit, scope: Scope) -> None:
        route = getattr(scope.get("route"), "path", "")
        self._meters.requests.labels(route, visit.model, visit.key, str(visit.status or GONE)).inc()
        seconds = time.monotonic() - visit.start
        logger.info(
            "request %s %s model=%s key=%s status=%d %.3f s",
            *(visit.id, route, visit.model, visit.key, visit.status or GONE, seconds),
        )


def _is_elsewhere(host: str) -> bool:
    """Whether a Host header holds a name that somebody's DNS answers for; addresses cannot be rebound."""
    try:
        name = urlsplit(f"//{host}").hostname or "localhost"
    except ValueError:
        return True
    with suppress(ValueError):
        ip_address(name)
        return False
    return name != "localhost" and not name.endswith(".localhost")


def fault(error: Exception, scope: Scope) -> ApiError:
    """What a client is told of an error; our own bugs go to the log, without their words: those may hold a prompt."""
    if isinstance(error, ApiError):
        return error
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]
    visit: Visit = scope[_VISIT]
    logger.error("request %s failed: %s at %s", visit.id, type(error).__name__, " < ".join(reversed(places)))
    return ApiError(
        500, "this server failed; its log says where, by the x-request-id", "server_error", "internal_error"
    )


def refusal(error: ApiError) -> Response:
    """An error as an answer."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if error.status in (408, 504):  # OpenAI's clients would run it twice more
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (
        408,
        503,
    ):  # after the first, more of the body may come; after the second, another server is due
        headers["connection"] = "close"
    return JSONResponse(faulty(error), error.status, headers)


async def on_api_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of our errors."""
    assert isinstance(error, ApiError)
    return refusal(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of its own errors: no such page, no such method."""
    assert isinstance(error, HTTPException)
    answer = refusal(ApiError(error.status_code, error.detail.lower(), code=_CODES.get(error.status_code)))
    answer.headers.update(error.headers or {})
    return answer


async def on_leaving(request: Request, error: Exception) -> Response:
    """FastAPI's handler of clients that left: nobody gets this."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=GONE)

"""The OpenAPI document of the HTTP API: bodies are read by us, so that FastAPI has to be told of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from distft.serving.replies import ChatReply, Faulty, Judgements, ModelCard, ModelCards, TextReply
from distft.serving.requests import Bodies

_TEMPLATE = "#/components/schemas/{model}"
#: Each event of a stream.
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}
_ANYWHERE = {401: "No key, or one that is not known.", 500: "This server failed."}
_ASKED = {
    **_ANYWHERE,
    400: "A field is wrong, missing, unknown or not supported, or the prompt is too long.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The key has had its share, or too many requests wait; see Retry-After.",
    503: "The server is stopping, or has no replica of the model.",
    504: "The answer took too long.",
}


def describe(app: FastAPI, bodies: Bodies) -> None:
    """Makes the application tell what it takes and gives.

    Args:
        app: With all its routes.
        bodies: What its three POST routes take.
    """
    replies = {
        each.__name__: TypeAdapter(each) for each in (TextReply, ChatReply, Judgements, ModelCard, ModelCards, Faulty)
    }
    asked: dict[str, tuple[type[BaseModel], str]] = {
        "/v1/completions": (bodies.completion, "TextReply"),
        "/v1/chat/completions": (bodies.chat, "ChatReply"),
        "/v1/classify": (bodies.classification, "Judgements"),
    }
    told = {"/v1/models": "ModelCards", "/v1/models/{model}": "ModelCard"}

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            kinds = [(body, "validation") for body, _ in asked.values()]
            schemas.update(models_json_schema(kinds, ref_template=_TEMPLATE)[1]["$defs"])  # type: ignore[arg-type]
            for name, adapter in replies.items():
                schema = adapter.json_schema(ref_template=_TEMPLATE)
                schemas.update(schema.pop("$defs", {}))
                schemas[name] = schema
            for path, (body, reply) in asked.items():
                operation = made["paths"][path]["post"]
                events = {} if reply == "Judgements" else _EVENTS
                operation["requestBody"] = {"required": True, "content": _json(body.__name__)}
                operation["responses"] = {"200": _answer("The answer.", {**_json(reply), **events}), **_errors(_ASKED)}
            for path, reply in told.items():
                missing = {404: _ASKED[404]} if "{" in path else {}
                made["paths"][path]["get"]["responses"] = {
                    "200": _answer("Models.", _json(reply)),
                    **_errors({**_ANYWHERE, **missing}),
                }
            text = {"text/plain": {"schema": {"type": "string"}}}
            made["paths"]["/metrics"]["get"]["responses"] = {"200": _answer("Counters.", text), **_errors(_ANYWHERE)}
            fine = {"application/json": {"schema": {"type": "object", "required": ["status"]}}}
            for path in ("/healthz", "/readyz"):
                waits = {503: "Not every model is ready."} if path == "/readyz" else {}
                made["paths"][path]["get"]["responses"] = {"200": _answer("Yes.", fine), **_errors(waits)}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _TEMPLATE.format(model=name)}}}


def _answer(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}


def _errors(said: dict[int, str]) -> dict[str, Any]:
    return {str(status): _answer(description, _json("Faulty")) for status, description in sorted(said.items())}

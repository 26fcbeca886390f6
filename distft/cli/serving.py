"""What a person needs to ask a served model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from distft.orchestrate.serving.server import Serving
from distft.serving.protocol import Model


def how_to_ask(serving: Serving) -> Iterator[str]:
    """Address, key, and a request to begin with, as lines."""
    names = ", ".join(model.name for model in serving.models)
    yield f"\n{names} at {serving.url}/v1, for OpenAI's clients; a page for people at {serving.url}/"
    if serving.key is not None:
        yield f"API key, made for this server and shown only now: {serving.key}"
    key = "" if serving.insecure else f' -H "Authorization: Bearer {serving.key or "$KEY"}"'
    path, body = _example(serving.models[0])
    yield f"  curl {serving.url}{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
    yield "Ctrl-C lets the requests that run finish, and ends it.\n"


def _example(model: Model) -> tuple[str, dict[str, Any]]:
    if model.kind == "classification":
        return "/v1/classify", {"model": model.name, "input": "a text"}
    if model.kind == "generation" and model.chat:
        return "/v1/chat/completions", {"model": model.name, "messages": [{"role": "user", "content": "Hello!"}]}
    return "/v1/completions", {"model": model.name, "prompt": "Once upon a time"}

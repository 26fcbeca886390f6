"""What a server answers to a certificate's prompts, over OpenAI's HTTP API with vLLM's fields for token ids.

``return_token_ids`` and what comes of it: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distft.certificate.record import Certificate, Record, Reply
from distft.errors import RunError

_AT_ONCE = 4
_SECONDS = 300.0
_LEAST = 1e-12  # a probability that is told as 0


def replay(certificate: Certificate, url: str, *, model: str | None = None, key: str | None = None) -> list[Reply]:
    """The server's replies, in the order of the records; a few are asked for at a time, as real clients do.

    Args:
        certificate: What is asked.
        url: The server's address, as in ``http://127.0.0.1:8000``.
        model: The model's name there; None for the first of ``/v1/models``.
        key: The API key; None where none is asked for.

    Raises:
        RunError: The server cannot be reached, refuses the key, or fails.
    """
    base = url.rstrip("/").removesuffix("/v1")
    name = model or _call(base, "/v1/models", key, None)["data"][0]["id"]

    def one(record: Record) -> Reply:
        try:
            return _reply(base, name, key, record, classifies=certificate.kind == "classification")
        except _Refused as refusal:
            return Reply(refused=str(refusal))
        except (KeyError, TypeError, IndexError) as error:
            raise RunError(f"the server's answer lacks {error}", where=base) from error

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(one, certificate.records))


class _Refused(Exception):
    """The server answers a prompt with 4xx."""


def _reply(base: str, model: str, key: str | None, record: Record, *, classifies: bool) -> Reply:
    ask = record.ask
    if classifies:
        found = _call(base, "/v1/classify", key, {"model": model, "input": ask.prompt})
        (one,) = found["data"]
        labels = {name: math.log(max(chance, _LEAST)) for name, chance in one["probabilities"].items()}
        return Reply(length=found.get("usage", {}).get("prompt_tokens"), labels=labels)
    body = {"model": model, "temperature": 0, "max_tokens": record.limit, "return_token_ids": True}
    if ask.messages is not None:
        found = _call(base, "/v1/chat/completions", key, {**body, "messages": ask.messages, "logprobs": True})
    else:
        prompt = list(ask.ids) if ask.prompt is None else ask.prompt
        found = _call(base, "/v1/completions", key, {**body, "prompt": prompt, "logprobs": 1})
    (choice,) = found["choices"]
    ids = choice.get("prompt_token_ids") or found.get("prompt_token_ids")
    told = choice["logprobs"] or {}
    logprobs = told.get("token_logprobs") or [token["logprob"] for token in told.get("content") or []]
    return Reply(
        None if ids is None else tuple(ids),
        found["usage"]["prompt_tokens"],
        tuple(choice["token_ids"]),
        tuple(logprobs),
        choice["finish_reason"] == "stop",
    )


def _call(base: str, path: str, key: str | None, body: dict[str, Any] | None) -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the certificate is the server's alone
    try:
        with direct.open(request, timeout=_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = _message(error)
        if error.code in (400, 413, 422) and body is not None:
            raise _Refused(said) from error
        raise RunError(f"the server answers {error.code}: {said}", where=base + path) from error
    except (OSError, ValueError) as error:
        raise RunError(f"the server cannot be asked: {error}", where=base + path) from error


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]

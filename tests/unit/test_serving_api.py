"""The HTTP API as a client that is no friend of ours sees it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from distft.serving.keys import Keys
from distft.serving.limits import Limits
from distft.serving.protocol import ApiError
from tests.unit.tiny_service import KEY, TinyService, served

OPEN = {"authorization": f"Bearer {KEY}"}
ASK = {"model": "parrot", "prompt": "hello", "max_tokens": 8}
CHAT = {"model": "parrot", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
TEXT = "/v1/completions"
TALK = "/v1/chat/completions"
JUDGE = "/v1/classify"
PLAIN = httpx.Client(verify=False, timeout=30)  # certificates take a second to load, and there are none here
LIMITS = Limits(body_bytes=100_000, body_seconds=0.4)


def opened(server: SimpleNamespace, headers: dict[str, str] = OPEN) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers=headers, timeout=30, verify=False)


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with served(TinyService(), limits=LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Iterator[httpx.Client]:
    with opened(server) as made:
        yield made


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape and all headers."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def eventually(true: Any, seconds: float = 1.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


def raw(server: SimpleNamespace, sent: bytes) -> bytes:
    """What a server says to some bytes on a connection of its own, until it closes it or says no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR) if b"GET" in sent[:4] else None
        try:
            return line.recv(65536)
        except TimeoutError:
            return b""


def post(body: bytes, *more: str, path: str = TEXT, length: str | None = None) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        *([] if length == "" else [f"Content-Length: {len(body) if length is None else length}"]),
        *more,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# ---------------------------------------------------------------- two hundred malformed requests

NUMBERS = [-1, 0, 10**6, 10**30, -(10**30), 1.5, True, "1", [], {}, [1], "NaN"]
WRONG: dict[str, list[Any]] = {
    "n": NUMBERS,
    "max_tokens": NUMBERS,
    "temperature": [-0.1, 2.1, 10**30, True, "1", [], {}, [0.5]],
    "top_p": [-0.1, 0, 1.1, 10**30, True, "1", [], {}],
    "frequency_penalty": [-2.1, 2.1, "x", [], True],
    "presence_penalty": [-2.1, 2.1, "x", [], True],
    "seed": [1.5, 2**63, -(2**63) - 1, "1", True, [], {}],
    "stop": ["", [""], ["a"] * 5, 1, {}, [1], "a" * 1000, "\x00", [["a"]]],
    "stream": ["true", 1, [], "yes"],
    "stream_options": [1, [], {"include_usage": 1}, {"more": True}, {"include_usage": True}],
    "model": [None, 1, [], {}, "", "m" * 300, "parrot\x00"],
    "user": [1, [], {}, "\x00"],
    "return_token_ids": ["yes", 1, []],
    "logit_bias": [{"1": 2}, [], 1],
    "unheard_of": [1, None, "x"],
}
TEXT_WRONG: dict[str, list[Any]] = {
    "prompt": [
        None,
        1,
        {},
        [],
        [[]],
        [""] * 17,
        [1, "a"],
        ["a", 1],
        [-1],
        [2**31],
        [1.5],
        [True],
        [[1], "a"],
        "a\x00",
        ["a\x00"],
        [None],
        [[[1]]],
        "a" * 300,
    ],
    "logprobs": [-1, 21, True, "1", 1.5],
    "echo": [1, "yes"],
    "best_of": [2, "1", 0],
    "suffix": ["x", 1],
}
CHAT_WRONG: dict[str, list[Any]] = {
    "messages": [
        None,
        1,
        "hello",
        {},
        [],
        [1],
        [None],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
        [{"role": "user", "content": "a\x00"}],
        [{"role": "user", "content": "x", "name": "bob"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "x"}] * 257,
    ],
    "logprobs": [1, "true"],
    "top_logprobs": [-1, 21, 3, True],
    "max_completion_tokens": NUMBERS,
    "tools": [[{"type": "function"}], {}, 1],
    "tool_choice": ["required", {"type": "function"}],
    "response_format": [{"type": "json_object"}, "text"],
    "functions": [[{}]],
    "audio": [{}],
    "modalities": [["audio"]],
    "reasoning_effort": ["high"],
    "store": [True],
}
JUDGE_WRONG: dict[str, list[Any]] = {"input": [None, 1, [], {}, [1], [None], ["a"] * 65, "a\x00", [["a"]]]}
BYTES = [
    b"",
    b"{",
    b"}",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"not json",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"{'model': 'parrot'}",
    b'{"model":"parrot","prompt":"\xff\xfe"}',
    b'{"model":"parrot","prompt":"\xc3\x28"}',
    b'{"model":"parrot","prompt":"\\ud800"}',
    b'{"model":"parrot","prompt":"\\u0000"}',
    b'{"model":"parrot","prompt":"a","temperature":NaN}',
    b'{"model":"parrot","prompt":"a","temperature":-Infinity}',
    b'{"model":"parrot","prompt":"a","temperature":1e999}',
    b'{"model":"parrot","prompt":"a","seed":' + b"9" * 5000 + b"}",
    b'{"model":"parrot","prompt":"a"}{}',
    b'{"model":"parrot","prompt":"a",}',
    b"[" * 50_000,
    b'{"a":' * 10_000,
    b'{"model":"parrot","prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model":"parrot","prompt":"a","logit_bias":' + b'{"a":' * 150 + b"1" + b"}" * 151,
    b"{" + b",".join(b'"k%d":1' % i for i in range(9000)) + b"}",
    b" " * 99_999,
    bytes(range(256)),
]


def malformed() -> list[tuple[str, bytes]]:
    found = [(path, body) for path in (TEXT, TALK, JUDGE) for body in BYTES]
    for path, sound, wrong in (
        (TEXT, ASK, {**WRONG, **TEXT_WRONG}),
        (TALK, CHAT, {**WRONG, **CHAT_WRONG}),
        (JUDGE, {"model": "judge", "input": "x"}, JUDGE_WRONG),
    ):
        for name, values in wrong.items():
            for value in values:
                if name in ("n", "max_tokens", "max_completion_tokens") and value is None:
                    continue
                found.append((path, json.dumps({**sound, name: value}).encode()))
    return found


def test_hundreds_of_malformed_bodies_are_refused_and_the_next_request_is_answered(client: httpx.Client) -> None:
    wrong = malformed()
    assert len(wrong) > 300
    header = {"content-type": "application/json"}
    for path, body in wrong:
        answer = client.post(path, content=body, headers=header)
        assert 400 <= answer.status_code < 500, (path, body[:100], answer.status_code, answer.text[:200])
        error_of(answer)
    assert client.post(TEXT, json=ASK).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        post(b"{}", length="-1"),
        post(b"{}", length="abc"),
        post(b"{}", length="1e3"),
        post(b"{}", length="99999999999999999999999"),
        post(b"{}", "Content-Length: 3"),
        post(b"{}", length="1"),
        post(b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=""),
        post(b"-1\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=""),
        post(b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=""),
        post(b"{}", "Expect: 100-continue"),
        post(b'{"model":"parrot"}', "Content-Encoding: gzip"),
        post(b"{}", "X-\x00: 1"),
        post(b"{}").replace(b"application/json", b"text/plain"),
        post(b"{}").replace(b"Content-Type: application/json\r\n", b""),
        post(b"{}").replace(b"HTTP/1.1", b"HTTP/9.9"),
        post(b"{}").replace(b"POST", b"BREW"),
        post(b"{}").replace(b"POST", b"DELETE"),
        post(b"{}").replace(KEY.encode(), b"\xff\xfe"),
        post(b"{}").replace(b"Bearer", b"Basic"),
        post(b"{}", path="/v1/../v1/completions"),
        post(b"{}", path="//v1/completions"),
        post(b"{}", path="/v1/completions/"),
        post(b"{}", path="/v1/completions%00"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\nhello\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n",
        b"GET /page/..%2f..%2fapi.py HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_malformed_http_is_refused_and_the_next_request_is_answered(
    server: SimpleNamespace, client: httpx.Client, sent: bytes
) -> None:
    said = raw(server, sent)
    if b"100-continue" in sent:
        said = said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n") or b"HTTP/1.1 4"
    assert said.startswith(b"HTTP/1.1 4"), said[:200]
    assert client.post(TEXT, json=ASK).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_fifty_megabytes_are_refused(client: httpx.Client, chunked: bool) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * (1 << 20)

    content: Any = parts() if chunked else b" " * (50 << 20)
    answer = client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"
    assert client.post(TEXT, json=ASK).status_code == 200


def test_a_body_that_takes_too_long_is_given_up(server: SimpleNamespace) -> None:
    start = time.monotonic()
    said = raw(server, post(b'{"model":', length="1000"))
    assert said.startswith(b"HTTP/1.1 408")
    assert b"x-should-retry: false" in said
    assert b"connection: close" in said
    assert time.monotonic() - start < 3


def test_a_body_that_never_ends_does_not_stop_the_server(server: SimpleNamespace, client: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(post(b"{", length="10"))
        line.close()
        assert client.post(TEXT, json=ASK).status_code == 200


# ---------------------------------------------------------------- answers that every request gets


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", TEXT, 405, "method_not_allowed"),
        ("OPTIONS", TEXT, 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("POST", TEXT, 415, "unsupported_media_type"),
    ],
)
def test_every_error_has_openais_shape(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize("path", ["/healthz", "/nowhere", "/v1/models", "/", "/openapi.json"])
def test_every_answer_has_an_id_and_security_headers_and_none_lets_other_sites_in(
    client: httpx.Client, path: str
) -> None:
    answer = client.get(path, headers={"x-request-id": "mine-1", "origin": "https://elsewhere.example"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert len(client.get(path, headers={"x-request-id": "a b"}).headers["x-request-id"]) == 32


def test_health_needs_no_key_and_all_else_does(server: SimpleNamespace) -> None:
    for path in ("/healthz", "/readyz"):
        assert PLAIN.get(server.url + path).status_code == 200
    for path in ("/v1/models", "/v1/models/parrot", "/metrics"):
        answer = PLAIN.get(server.url + path, headers={"authorization": "Bearer sk-wrongwrongwrong"})
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_wrong_key_is_refused_before_the_body_is_read(server: SimpleNamespace) -> None:
    start = time.monotonic()
    said = raw(server, post(b"{", length="1000").replace(KEY.encode(), b"sk-wrongwrongwrong"))
    assert said.startswith(b"HTTP/1.1 401")
    assert time.monotonic() - start < LIMITS.body_seconds


def test_no_key_is_asked_for_where_none_is_wanted() -> None:
    from distft.serving.api import create

    async def asked() -> tuple[int, int]:
        transport = httpx.ASGITransport(create(TinyService(), None))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            models, metrics = await client.get("/v1/models"), await client.get("/metrics")
            return models.status_code, metrics.status_code

    assert asyncio.run(asked()) == (200, 200)


def test_metrics_count_by_names_of_ours_only(client: httpx.Client) -> None:
    client.post(TEXT, json={**ASK, "model": "made-up-by-a-client"})
    client.get("/made/up/by/a/client")
    client.post(TEXT, json=ASK)
    told = client.get("/metrics").text
    assert 'distft_requests_total{key="alice",model="parrot",route="/v1/completions",status="200"}' in told
    assert 'distft_tokens_total{key="alice",kind="completion",model="parrot"}' in told
    assert 'distft_time_to_first_token_seconds_count{model="parrot"}' in told
    assert 'distft_time_per_token_seconds_count{model="parrot"}' in told
    assert "distft_requests_running 0.0" in told
    assert "by-a-client" not in told
    assert "made/up" not in told


# ---------------------------------------------------------------- waiting, leaving, failing


def test_a_client_that_leaves_frees_its_place_within_a_second() -> None:
    service = TinyService(pause=0.05)
    with served(service) as server, opened(server) as client:
        for body in ({**ASK, "stream": True, "max_tokens": 200}, {**ASK, "max_tokens": 200}):
            closed = service.closed
            line = socket.create_connection(("127.0.0.1", server.port))
            line.sendall(post(json.dumps(body).encode()))
            assert eventually(lambda: service.open == 1)
            line.close()
            assert eventually(lambda: service.open == 0 and server.app.state.gate.running == 0, 1.0)
            assert service.closed == closed + 1
        assert client.get("/healthz").status_code == 200


def test_a_client_that_leaves_before_the_first_token_frees_its_place_too() -> None:
    service = TinyService(pause=60)
    with served(service, limits=Limits(quiet_seconds=30)) as server:
        line = socket.create_connection(("127.0.0.1", server.port))
        line.sendall(post(json.dumps({**ASK, "stream": True}).encode()))
        assert eventually(lambda: service.open == 1)
        line.close()
        assert eventually(lambda: service.open == 0, 1.0)


def test_a_silent_stream_is_kept_open_by_comments() -> None:
    with served(TinyService(pause=0.5), limits=Limits(quiet_seconds=0.1)) as server:
        answer = PLAIN.post(server.url + TEXT, json={**ASK, "max_tokens": 2, "stream": True}, headers=OPEN)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.count(": waiting\n\n") >= 4
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", [TEXT, TALK])
def test_an_answer_that_takes_too_long_is_a_504_that_is_not_tried_again(path: str) -> None:
    service = TinyService(pause=0.2)
    body = {**(ASK if path == TEXT else CHAT), "max_tokens": 100}
    with (
        served(service, limits=Limits(seconds=0.5)) as server,
        opened(server) as client,
    ):
        answer = client.post(path, json=body)
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        streamed = client.post(path, json={**body, "stream": True})
        assert streamed.status_code == 200
        last = streamed.text.strip().rpartition("\n\n")[2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in streamed.text
        assert eventually(lambda: service.open == 0)


def test_an_error_of_ours_is_told_and_a_bug_is_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    lost = ApiError(503, "the replica is gone", "server_error", code="replica_lost", retry_after=1.2)
    for fault, status, code in ((lost, 503, "replica_lost"), (ValueError("secret prompt"), 500, "internal_error")):
        with (
            caplog.at_level(logging.DEBUG),
            served(TinyService(fault=fault)) as server,
            opened(server) as client,
        ):
            answer = client.post(TEXT, json=ASK)
            assert (answer.status_code, error_of(answer)["code"]) == (status, code)
            assert status != 503 or answer.headers["retry-after"] == "2"
            assert "secret" not in answer.text
            streamed = client.post(TEXT, json={**ASK, "stream": True}).text
            assert code in streamed
            assert "[DONE]" not in streamed
    assert "ValueError at " in caplog.text
    assert "secret" not in caplog.text


def test_no_text_of_a_client_reaches_the_log(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for body in ({**ASK, "prompt": "my-secret"}, {**ASK, "prompt": ["my-secret", 1]}, {**ASK, "my-secret": 1}):
            client.post(TEXT, json=body)
        client.post(TALK, json={**CHAT, "model": "my-secret"})
        client.get("/my-secret?my-secret=1", headers={"x-request-id": "my secret"})
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("distft"))
    assert "request " in ours
    assert "my-secret" not in ours
    assert KEY not in ours


def test_requests_beyond_the_queue_are_told_when_to_come_back() -> None:
    service = TinyService(pause=0.1)
    limits = Limits(running=1, waiting=1)
    with served(service, limits=limits) as server, opened(server) as client:
        told: list[httpx.Response] = []

        def ask() -> None:
            told.append(PLAIN.post(server.url + TEXT, json={**ASK, "max_tokens": 20}, headers=OPEN, timeout=30))

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for count, thread in enumerate(asking):
            thread.start()
            gate = server.app.state.gate
            assert eventually(lambda: gate.running + gate.waiting == count + 1, 5)  # noqa: B023
        for stream in (False, True):
            answer = client.post(TEXT, json={**ASK, "stream": stream})
            assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        assert client.post(JUDGE, json={"model": "judge", "input": "x"}).status_code == 429
        assert "distft_requests_waiting 1.0" in client.get("/metrics").text
        for thread in asking:
            thread.join()
        assert [each.status_code for each in told] == [200, 200]
        assert client.post(TEXT, json={**ASK, "max_tokens": 1}).status_code == 200


def test_a_server_that_stops_refuses_new_requests_and_finishes_old_ones() -> None:
    asked = {**ASK, "stream": True}
    with (
        served(TinyService(pause=0.1)) as server,
        opened(server) as client,
        client.stream("POST", TEXT, json=asked) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        server.app.state.draining = True
        answer = PLAIN.post(server.url + TEXT, json=ASK, headers=OPEN)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "draining")
        assert answer.headers["retry-after"] == "1"
        assert PLAIN.get(server.url + "/readyz").status_code == 503
        assert PLAIN.get(server.url + "/healthz").status_code == 200
        assert list(lines)[-2] == "data: [DONE]"


def test_a_server_is_ready_when_all_its_models_are() -> None:
    service = TinyService(ready=False)
    with served(service) as server:
        answer = PLAIN.get(server.url + "/readyz")
        assert (answer.status_code, error_of(answer)["message"]) == (503, "2 of 3 models are ready")
        service.ready = True
        assert PLAIN.get(server.url + "/readyz").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_no_replica_took_may_come_again_later(stream: bool) -> None:
    with served(TinyService(pause=0.5, running=False), limits=Limits(seconds=0.2)) as server, opened(server) as client:
        answer = client.post(TEXT, json={**ASK, "stream": stream})
        if stream:  # the prompt's piece came at once, so that the status was told
            assert '"code":"starting"' in answer.text
            assert "[DONE]" not in answer.text
        else:
            assert (answer.status_code, error_of(answer)["code"]) == (503, "starting")
            assert answer.headers["retry-after"] == "10"
            assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost:8000", "127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "192.168.3.4", "")),
        *((host, 200) for host in ("LOCALHOST", "api.localhost:80")),
        *((host, 421) for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io")),
        *((host, 421) for host in ("localhost@evil.example", "[bad", "evillocalhost")),
    ],
)
def test_a_server_for_its_own_machine_does_not_answer_to_other_names(host: str, status: int) -> None:
    """A page elsewhere could have its own name resolved to 127.0.0.1, and read the answers (DNS rebinding)."""
    from distft.serving.api import create

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create(TinyService(), None, loopback=True))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get(path, headers={"host": host}) for path in ("/v1/models", "/", "/healthz")]

    answers = asyncio.run(asked())
    assert [answer.status_code for answer in answers] == [status] * 3
    if status == 421:
        assert error_of(answers[0])["code"] == "misdirected_request"


def test_each_key_has_its_own_share_of_requests_and_tokens() -> None:
    keys = Keys.listed(f"alice:{KEY},bob:{KEY}2")
    limits = Limits(requests_per_minute=3, tokens_per_minute=100)
    with served(TinyService(), keys, limits) as server, opened(server, {}) as client:
        bob = {"authorization": f"Bearer {KEY}2"}
        answers = [client.post(TEXT, json=ASK, headers=OPEN) for _ in range(4)]
        assert [each.status_code for each in answers] == [200, 200, 200, 429]
        assert "requests" in error_of(answers[-1])["message"]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert client.post(TEXT, json={**ASK, "max_tokens": 150}, headers=bob).status_code == 200
        answer = client.post(TEXT, json=ASK, headers=bob)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
        assert "tokens" in error_of(answer)["message"]


def test_a_key_has_the_share_that_its_line_says_from_when_it_says_so(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{KEY} requests=2\nbob:{KEY}2")
    file.chmod(0o600)
    with served(TinyService(), Keys(file=file)) as server, opened(server, {}) as client:
        bob = {"authorization": f"Bearer {KEY}2"}
        assert [client.post(TEXT, json=ASK, headers=OPEN).status_code for _ in range(3)] == [200, 200, 429]
        assert {client.post(TEXT, json=ASK, headers=bob).status_code for _ in range(5)} == {200}
        file.write_text(f"alice:{KEY} requests=1000\nbob:{KEY}2")
        assert eventually(lambda: client.post(TEXT, json=ASK, headers=OPEN).status_code == 200, 5)
        assert [client.post(TEXT, json=ASK, headers=OPEN).status_code for _ in range(3)] == [200] * 3


def test_a_new_key_counts_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o600)
    with served(TinyService(), Keys(file=file)) as server, opened(server, {}) as client:
        new = {"authorization": f"Bearer {KEY}-new"}
        assert client.get("/v1/models", headers=new).status_code == 401
        file.write_text(f"{KEY}-new")
        assert eventually(lambda: client.get("/v1/models", headers=new).status_code == 200, 5)
        assert client.get("/v1/models", headers=OPEN).status_code == 401


def test_labels_come_with_probabilities(client: httpx.Client) -> None:
    told = client.post(JUDGE, json={"model": "judge", "input": ["abcdefg", "ab"]}).json()
    assert [each["label"] for each in told["data"]] == ["long", "short"]
    assert told["data"][0]["probabilities"] == {"long": 0.7, "short": pytest.approx(0.3)}
    assert told["usage"] == {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}
    assert error_of(client.post(JUDGE, json={"model": "parrot", "input": "x"}))["code"] == "no_classifier"


def test_the_page_may_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    from distft.serving.api import create

    (tmp_path / "index.html").write_text("<h1>hello</h1>")
    (tmp_path / "page.js").write_text("1")

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create(TinyService(), None, page=tmp_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [await client.get(path) for path in ("/", "/page/page.js", "/page/api.py")]

    page, script, other = asyncio.run(asked())
    assert page.text == "<h1>hello</h1>"
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert script.headers["content-type"].startswith("text/javascript")
    assert other.status_code == 404

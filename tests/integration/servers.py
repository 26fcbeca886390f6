"""A run's model behind ``distft serve`` in a process of its own, and people who ask it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil

from distft.certificate import Certificate
from tests.integration.conftest import Home
from tests.support import free_port

JOB = """\
model: {source: ./model, dtype: fp32}
task: {kind: language_modeling}
data: {source: ./corpus.jsonl, max_tokens: 64, overlong: split, splits: {validation: 0.1, test: 0.1}}
train: {steps: 30, batch_size: 8, learning_rate: 3.0e-3}
cluster: {workers: 1}
evaluate: {compare_base: false}
track: {tensorboard: false}
"""
KEY = "tests:a-key-that-is-long-enough"


class Server:
    """``distft serve`` in a process of its own.

    Attributes:
        said: What it had printed when it was ready; ``process.communicate()`` gives the rest.
    """

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url, self.said = process, url, ""
        self.key = KEY.partition(":")[2]
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {self.key}"}, timeout=120)

    def ready(self) -> bool:
        """Whether it answers, and its command has said so: replicas may answer before the command sees them."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], 0)[0]:
            self.said += os.read(self.process.stdout.fileno(), 2**16).decode()
        try:
            return "Ctrl-C lets" in self.said and self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def ask(self, prompt: str, tokens: int = 16) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
        return self.http.post("/v1/completions", json=body)

    def answers_as(self, certificate: Certificate) -> bool:
        record = certificate.records[0]
        assert record.ask.prompt is not None
        found = self.ask(record.ask.prompt, len(record.tokens)).json()
        return tuple(found["choices"][0]["token_ids"]) == record.tokens


@contextmanager
def served(home: Home, *words: str) -> Iterator[Server]:
    port = free_port()
    home.environment["DISTFT_API_KEYS"] = KEY
    process = home.start("serve", *words, "--port", str(port), "--address", home.address)
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        until = time.time() + 400
        while not server.ready():
            assert process.poll() is None, process.communicate()
            assert time.time() < until, "it is not ready"
            time.sleep(0.5)
        yield server
    finally:
        server.http.close()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=90)
            assert process.returncode == 0, (output, errors)


def replicas() -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith("ray::ServeReplica:distft:tiny"):
            yield process


class Clients:
    """People who ask without a pause, and what they get."""

    def __init__(self, server: Server, count: int = 4) -> None:
        self.statuses: list[int] = []
        self._over = threading.Event()
        self._server = server
        self._threads = [threading.Thread(target=self._ask, args=[number]) for number in range(count)]

    def _ask(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {self._server.key}"}
        body = {"model": "tiny", "prompt": f"{number}: the people", "max_tokens": 16, "temperature": 0}
        with httpx.Client(base_url=self._server.url, headers=headers, timeout=120) as http:
            while not self._over.is_set():
                answer = http.post("/v1/completions", json=body)
                self.statuses.append(answer.status_code)
                if answer.status_code != 200:
                    assert answer.json()["error"]["code"] in ("replica_lost", "unavailable"), answer.text
                    time.sleep(0.5)

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(150)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

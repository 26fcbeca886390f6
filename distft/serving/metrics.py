"""What ``/metrics`` tells, for Prometheus: how many ask, how long they wait, how fast they are answered."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from distft.serving.protocol import Delta

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Meters:
    """Counters of one server; labels hold names of models, keys and routes only, never what a client wrote."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "distft_requests", "Requests answered.", ("route", "model", "key", "status"), registry=self.registry
        )
        self.tokens = Counter("distft_tokens", "Tokens.", ("model", "key", "kind"), registry=self.registry)
        self.running = Gauge("distft_requests_running", "Requests being answered.", registry=self.registry)
        self.waiting = Gauge("distft_requests_waiting", "Requests that wait for a place.", registry=self.registry)
        self.first = Histogram(
            "distft_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ("model",),
            buckets=_FIRST,
            registry=self.registry,
        )
        self.each = Histogram(
            "distft_time_per_token_seconds",
            "From an answer's first token to its last, by token after the first.",
            ("model",),
            buckets=_EACH,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self.registry)

    async def timed(self, pieces: AsyncGenerator[Delta], model: str, key: str, start: float) -> AsyncGenerator[Delta]:
        """The same pieces, counted and timed as they pass.

        Args:
            pieces: Of all answers to one request.
            model: Their model's name.
            key: The name of the key.
            start: When the request arrived, in seconds of ``time.monotonic``.
        """
        read, written = (self.tokens.labels(model, key, kind) for kind in ("prompt", "completion"))
        begun: dict[int, tuple[float, int]] = {}  # by answer: when its first tokens came, and how many since
        async with aclosing(pieces):
            async for delta in pieces:
                now = time.monotonic()
                read.inc(delta.prompt_tokens)
                written.inc(delta.new_tokens)
                if delta.index in begun:
                    first, after = begun[delta.index]
                    begun[delta.index] = first, after + delta.new_tokens
                elif delta.new_tokens:
                    if not begun:
                        self.first.labels(model).observe(now - start)
                    begun[delta.index] = now, 0
                if delta.finish and begun.get(delta.index, (0, 0))[1]:
                    first, after = begun[delta.index]
                    self.each.labels(model).observe((now - first) / after)
                yield delta

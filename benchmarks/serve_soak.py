"""A served model at four fifths of what it can do, for long, with clients of all manners: what it loses, what it keeps.

Of 100 clients 75 read to the end, half of them as the answer is written; 10 leave early, 5 read a line a second, 5 read
one line and then hold their connection without reading, and 5 send too much. They come at random (a Poisson process),
whether or not the ones before are answered. See ``serve.py RUN soak``.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
from scipy import stats

SHARE = 0.8
KINDS = {"whole": 38, "stream": 37, "leaves": 10, "slow": 5, "holds": 5, "oversized": 5}
#: What each kind of client may be told; beside that, 429 by an open loop, and 503 where replicas are killed.
ASKED_FOR = {"oversized": {"400 context_length_exceeded", "413 body_too_large"}, "leaves": {"200", "left"}}
LOST = {f"{begun}{code}" for begun in ("503 ", "200, then ") for code in ("replica_lost", "starting", "unavailable")}
#: A request may take 300 s, after which the server answers; a slow client gives up after so long.
HUNG_SECONDS, SLOW_SECONDS = 330.0, 60.0
SAMPLE_SECONDS, CAPACITY_SECONDS, AT_ONCE = 5.0, 30.0, 16


@dataclass(frozen=True)
class Clients:
    """People who ask one model.

    Attributes:
        http: Their connections.
        model: Its name.
        words: What they write of.
        prompt_words: In a prompt at most.
        tokens: In an answer at most.
    """

    http: httpx.AsyncClient
    model: str
    words: list[str]
    prompt_words: int
    tokens: int

    def body(self, draw: random.Random, **more: Any) -> dict[str, Any]:
        """What one of them asks."""
        prompt = " ".join(draw.choices(self.words, k=draw.randint(1, self.prompt_words)))
        asked = {"model": self.model, "prompt": prompt, "max_tokens": draw.randint(self.tokens // 4, self.tokens)}
        return {**asked, "temperature": draw.choice([0, 1]), "seed": draw.randrange(1000), **more}

    async def whole(self, draw: random.Random) -> str:
        return told(await self.http.post("/v1/completions", json=self.body(draw)))

    async def stream(self, draw: random.Random, pause: float = 0.0) -> str:
        """Reads an answer as it is written, a pause after each line."""
        last = ""
        async with self.http.stream("POST", "/v1/completions", json=self.body(draw, stream=True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return told(answer)
            async for line in answer.aiter_lines():
                last = line or last
                await asyncio.sleep(pause)
        return "200" if last == "data: [DONE]" else f"200, then {failed(last)}"

    async def leaves(self, draw: random.Random) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(draw.uniform(0, 1)):
                return await (self.stream(draw) if draw.random() < 0.5 else self.whole(draw))
        return "left"

    async def slow(self, draw: random.Random) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(SLOW_SECONDS):
                return await self.stream(draw, pause=1.0)
        return "200"

    async def holds(self, draw: random.Random) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(SLOW_SECONDS):
                return await self.stream(draw, pause=2 * SLOW_SECONDS)
        return "200"

    async def oversized(self, draw: random.Random) -> str:
        prompt = "the people " * draw.choice([40_000, 200_000])  # too long for the context; too large for a body
        return told(await self.http.post("/v1/completions", json=self.body(draw, prompt=prompt)))

    async def one(self, kind: str, draw: random.Random) -> str:
        """What becomes of one client."""
        try:
            async with asyncio.timeout(HUNG_SECONDS):
                return await getattr(self, kind)(draw)
        except TimeoutError:
            return "hung"
        except httpx.HTTPError as error:
            return type(error).__name__


def told(answer: httpx.Response) -> str:
    return "200" if answer.status_code == 200 else f"{answer.status_code} {failed(answer.text)}"


def failed(said: str) -> str:
    """The code of an error in OpenAI's shape."""
    try:
        return str(json.loads(said.removeprefix("data: "))["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"without an error of ours: {said[:60]!r}"


def asked_for(kind: str, outcome: str, *, kills: bool) -> bool:
    """Whether an outcome is what such a client must expect."""
    if outcome.startswith("429"):
        return True
    if kills and outcome in LOST:
        return True
    return outcome in ASKED_FOR.get(kind, {"200"})


async def clients_of(http: httpx.AsyncClient, model: str, words: list[str]) -> Clients:
    """Clients whose prompts and answers fit the model's context, a prompt of up to 64 words and 128 tokens at most."""
    (card,) = (await http.get("/v1/models")).raise_for_status().json()["data"]
    asked = {"model": model, "prompt": " ".join(words[:8]), "max_tokens": 1}
    usage = (await http.post("/v1/completions", json=asked)).raise_for_status().json()["usage"]
    each = usage["prompt_tokens"] / 8
    return Clients(http, model, words, min(64, int(card["context"] / 2 / each)), min(128, card["context"] // 4))


async def capacity(clients: Clients) -> float:
    """Requests per second that are answered when 16 clients ask without a pause."""
    until, done = time.monotonic() + CAPACITY_SECONDS, 0

    async def ask(number: int) -> None:
        nonlocal done
        draw = random.Random(number)
        while time.monotonic() < until:
            outcome = await clients.one(draw.choice(["whole", "stream"]), draw)
            assert outcome == "200", outcome
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(ask(number) for number in range(AT_ONCE)))
    return done / (time.monotonic() - began)


class Processes:
    """The processes of the server, which are descendants of this one: what each part of it holds."""

    def __init__(self, model: str) -> None:
        self._titles = {
            "gateway": "ray::ServeReplica:distft:gateway",
            "replica": f"ray::ServeReplica:distft:{model}",
            "proxy": "ray::ProxyActor",
        }
        self.samples: dict[str, list[tuple[float, int, float, int]]] = defaultdict(list)
        self._began = time.monotonic()

    def of(self, part: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(self._titles[part]):
                    found.append(process)
        return found

    def look(self) -> None:
        """Seconds, pid, MB that are its own, and threads."""
        for part in self._titles:
            for process in self.of(part):
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    own = (memory.rss - memory.shared) / 1e6
                    seconds = time.monotonic() - self._began
                    self.samples[part].append((seconds, process.pid, own, process.num_threads()))

    def kept(self, part: str) -> dict[str, Any]:
        """Memory and threads over time, of the process of a part that lived longest."""
        pids = Counter(pid for _, pid, _, _ in self.samples[part])
        longest = pids.most_common(1)[0][0]
        mine = np.array([(at, own, threads) for at, pid, own, threads in self.samples[part] if pid == longest])
        settled = mine[len(mine) // 5 :]  # caches fill first
        return {
            "processes": len(pids),
            "seconds": round(mine[-1, 0] - mine[0, 0]),
            "mb": {"first": round(mine[0, 1], 1), "settled": round(settled[0, 1], 1), "last": round(mine[-1, 1], 1)},
            "mb_per_hour": slope(settled[:, 0] / 3600, settled[:, 1]),
            "threads": {"settled": int(settled[0, 2]), "most": int(mine[:, 2].max()), "last": int(mine[-1, 2])},
        }


def slope(hours: np.ndarray, values: np.ndarray) -> dict[str, float] | None:
    """The slope of a line through the means of ten stretches of time, whose errors are nearly independent; 95 %."""
    if len(values) < 20:
        return None
    parts = [[part.mean() for part in np.array_split(series, 10)] for series in (hours, values)]
    line = stats.linregress(*parts)
    half = float(stats.t.ppf(0.975, 8) * line.stderr)
    return {"value": round(line.slope, 2), "low": round(line.slope - half, 2), "high": round(line.slope + half, 2)}


async def every(seconds: float, work: Callable[[], Any]) -> None:
    while True:
        await asyncio.sleep(seconds)
        work()


async def arrivals(clients: Clients, per_second: float, seconds: float) -> dict[str, Counter[str]]:
    """What became of the clients that came, by kind."""
    draw, found = random.Random(11), defaultdict[str, Counter[str]](Counter)

    async def one(kind: str, seed: int) -> None:
        found[kind][await clients.one(kind, random.Random(seed))] += 1

    running, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        running.append(asyncio.create_task(one(kind, draw.randrange(1 << 30))))
        await asyncio.sleep(draw.expovariate(per_second))
    await asyncio.gather(*running)
    return found


async def places(http: httpx.AsyncClient) -> dict[str, float]:
    """Places that are taken when nobody is there any more, or after five seconds, as /metrics says."""
    for _ in range(10):
        text = (await http.get("/metrics")).raise_for_status().text
        found = dict(re.findall(r"^distft_requests_(running|waiting) (.+)$", text, re.MULTILINE))
        taken = {name: float(count) for name, count in found.items()}
        if not any(taken.values()):
            break
        await asyncio.sleep(0.5)
    return taken


async def soaked(
    http: httpx.AsyncClient, model: str, words: list[str], minutes: float, kill_every: float | None
) -> dict[str, Any]:
    """Measures capacity, then lets clients come; the report.

    Args:
        http: The way to the server, a descendant of this process.
        model: What is asked.
        words: What clients write of.
        minutes: How long they come.
        kill_every: A replica is ended by SIGKILL every so many seconds; None: never.
    """
    clients, processes = await clients_of(http, model, words), Processes(model)
    await capacity(clients)  # the first is for caches
    most = await capacity(clients)
    print(f"capacity {most:.2f} requests/s", flush=True)
    killed = 0

    def kill() -> None:
        nonlocal killed
        for process in processes.of("replica")[:1]:
            process.kill()
            killed += 1

    aside = [asyncio.create_task(every(SAMPLE_SECONDS, processes.look))]
    if kill_every is not None:
        aside.append(asyncio.create_task(every(kill_every, kill)))
    found = await arrivals(clients, SHARE * most, 60 * minutes)
    for task in aside:
        task.cancel()
    unasked = Counter[str]()
    for kind, outcomes in found.items():
        for outcome, count in outcomes.items():
            if not asked_for(kind, outcome, kills=kill_every is not None):
                unasked[f"{kind}: {outcome}"] += count
    return {
        "minutes": minutes,
        "capacity_per_second": most,
        "arrivals_per_second": SHARE * most,
        "clients": sum(sum(outcomes.values()) for outcomes in found.values()),
        "outcomes": {kind: dict(outcomes) for kind, outcomes in found.items()},
        "not_asked_for": dict(unasked),
        "replicas_killed": killed,
        "places_taken_at_the_end": await places(http),
        "kept": {part: processes.kept(part) for part in processes.samples},
    }

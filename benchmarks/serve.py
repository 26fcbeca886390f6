"""How fast a run's model is served, and what stands between the engine and the client.

- ``python benchmarks/serve.py RUN throughput``: 16 requests of 128 tokens at once over HTTP, Ray Serve and all, against
  transformers' continuous batching manager alone in one process with as many threads, in turn.
- ``hop``: a request for one token through Ray Serve, against the same HTTP API in one process without Ray.
- ``load``: requests that arrive at random (a Poisson process, whether or not the ones before are answered) at some
  shares of the throughput: time to first token, time per token, and the share of requests within a goal.
- ``vllm``: the engine vllm, with this environment's vLLM: the throughput against vLLM's engine alone in one process,
  and vLLM's own OpenAI server; and the time to the first token, of both servers, of 16 requests that are streamed at
  once and of requests that arrive at random.
- ``soak --minutes 30 [--kill-every 120]``: four fifths of the capacity for a long time, with clients that leave, read
  slowly or send too much, while replicas are killed or not: what was lost, and whether memory and threads stay.

RUN is the folder of a run that was exported, such as the quickstart's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.serve_soak import soaked  # noqa: E402
from distft.runs import Run, read_json, write_json  # noqa: E402

BASELINE = ROOT / "benchmarks" / "baselines" / "serve.json"
REQUESTS, NEW_TOKENS = 16, 128
#: Goals of a request that a reader does not wait for: seconds to the first token, and between two.
FIRST_SECONDS, EACH_SECONDS = 2.0, 0.25
#: For vLLM's own engine and server, which otherwise take memory for far more answers than these.
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
WORDS = """
The people of our union have asked what the coming year will bring to the schools and roads of every state
"""


@dataclass(frozen=True)
class Timed:
    """One streamed answer: seconds to its first token, between tokens on average, and how many it had."""

    first: float
    each: float
    tokens: int


def prompts(count: int, seed: int = 1) -> list[str]:
    """Texts of about 64 words, no two alike."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=64)) for _ in range(count)]


def served(run: Run, port: int, engine: str = "auto") -> contextlib.AbstractContextManager[str]:
    """The run behind ``distft serve``; its URL."""
    command = [sys.executable, "-m", "distft", "serve", str(run.folder), "--port", str(port), "--address", "local"]
    return answering([*command, "--engine", engine], port, "/readyz")


def served_by_vllm(run: Run, port: int) -> contextlib.AbstractContextManager[str]:
    """The run behind vLLM's own server, as it is without further words; its URL."""
    dtype = DTYPES[read_json(run.export / "distft.json")["dtype"]]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(run.export)]
    command += ["--served-model-name", run.name, "--port", str(port), "--dtype", dtype]
    return answering([*command, "--no-enable-prefix-caching"], port, "/health", VLLM)


@contextlib.contextmanager
def answering(command: list[str], port: int, ready: str, settings: dict[str, str] | None = None) -> Iterator[str]:
    """A server's process; its URL once ``ready`` answers."""
    environment = {"DISTFT_API_KEYS": "benchmark-" + "0" * 32, **(settings or {}), **os.environ}
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + ready, timeout=5).status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command[1:4])} ended before it was ready")
            time.sleep(1)
        yield url
    finally:
        process.send_signal(2)
        process.wait(120)


def client(url: str) -> httpx.AsyncClient:
    headers = {"Authorization": "Bearer benchmark-" + "0" * 32}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=httpx.Limits(max_connections=None))


async def pieces(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The chunks of one streamed completion."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    async with http.stream("POST", "/v1/completions", json=asked) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def timed(http: httpx.AsyncClient, model: str, prompt: str) -> Timed:
    began, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
    async for piece in pieces(http, {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS}):
        last = time.perf_counter()
        first = first or last
        if piece.get("usage"):
            tokens = piece["usage"]["completion_tokens"]
    return Timed(first - began, (last - first) / max(1, tokens - 1), tokens)


async def burst(url: str, model: str) -> tuple[float, list[Timed]]:
    """Tokens per second of 16 requests that are sent at once, each answer streamed token by token; the answers."""
    async with client(url) as http:
        began = time.perf_counter()
        answers = await asyncio.gather(*(timed(http, model, prompt) for prompt in prompts(REQUESTS)))
        return sum(answer.tokens for answer in answers) / (time.perf_counter() - began), answers


async def burst_of_wholes(url: str, model: str) -> float:
    """The same with each answer sent whole."""
    async with client(url) as http:
        asked = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0}
        began = time.perf_counter()
        posts = (http.post("/v1/completions", json={**asked, "prompt": prompt}) for prompt in prompts(REQUESTS))
        answers = [answer.raise_for_status().json() for answer in await asyncio.gather(*posts)]
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        return tokens / (time.perf_counter() - began)


ALONE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
folder, count, dtype, prompts = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = [tokenizer(prompt)["input_ids"] for prompt in prompts]
settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=model.generation_config.eos_token_id)
blocks = 8 + len(inputs) * (2 + (max(map(len, inputs)) + count) // 32)
batching = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=1024)
for repeat in range(2):
    began = time.perf_counter()
    written = model.generate_batch(inputs, generation_config=settings, continuous_batching_config=batching)
    tokens = sum(len(one.generated_tokens) for one in written.values())
    print("RATE", tokens / (time.perf_counter() - began))
"""


ALONE_VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, count, dtype, prompts = json.load(sys.stdin)
model = LLM(folder, dtype=dtype, max_num_seqs=len(prompts), enable_prefix_caching=False, disable_log_stats=True)
for repeat in range(2):
    began = time.perf_counter()
    written = model.generate(prompts, SamplingParams(temperature=0, max_tokens=count), use_tqdm=False)
    tokens = sum(len(one.outputs[0].token_ids) for one in written)
    print("RATE", tokens / (time.perf_counter() - began))
"""


def alone(run: Run, script: str = ALONE) -> float:
    """Tokens per second of an engine alone, in a process of its own, the second time."""
    asked = json.dumps(
        [str(run.export), NEW_TOKENS, DTYPES[read_json(run.export / "distft.json")["dtype"]], prompts(REQUESTS)]
    )
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    told = subprocess.run(
        [sys.executable, "-c", script],
        input=asked,
        text=True,
        check=True,
        stdout=subprocess.PIPE,
        env={**VLLM, **os.environ, **threads},
    )
    # The libraries print too.
    return float([line for line in told.stdout.splitlines() if line.startswith("RATE ")][-1].split()[1])


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def throughput(run: Run, repeats: int) -> dict[str, Any]:
    """Tokens per second through everything, and of the manager alone, in turn."""
    found: dict[str, list[float]] = {"alone": [], "streamed": [], "whole": []}
    for _ in range(repeats):
        found["alone"].append(alone(run))
        with served(run, 8100) as url:
            asyncio.run(burst_of_wholes(url, run.name))  # the first is for caches
            found["whole"].append(asyncio.run(burst_of_wholes(url, run.name)))
            found["streamed"].append(asyncio.run(burst(url, run.name))[0])
        print({name: round(values[-1], 1) for name, values in found.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {f"{name}_over_alone": medians[name] / medians["alone"] for name in ("streamed", "whole")}
    return {"tokens_per_second": found, **ratios}


def vllm(run: Run, repeats: int) -> dict[str, Any]:
    """Our server with the engine vllm, vLLM's engine alone, and vLLM's own server, in turn."""
    alone_rates: list[float] = []
    servers = {"ours": lambda: served(run, 8105, "vllm"), "vllm_server": lambda: served_by_vllm(run, 8106)}
    rates: dict[str, list[float]] = {name: [] for name in servers}
    at_once: dict[str, list[float]] = {name: [] for name in servers}
    asked: dict[str, list[list[Timed | None]]] = {name: [] for name in servers}
    for _ in range(repeats):
        alone_rates.append(alone(run, ALONE_VLLM))
        for name, server in servers.items():
            with server() as url:
                asyncio.run(burst_of_wholes(url, run.name))  # the first is for caches
                rates[name].append(asyncio.run(burst_of_wholes(url, run.name)))
                for _ in range(5):
                    at_once[name] += [answer.first for answer in asyncio.run(burst(url, run.name))[1]]
                per_second = 0.6 * alone_rates[0] / NEW_TOKENS
                asked[name].append(asyncio.run(arrivals(url, run.name, per_second, 60)))
            print(name, round(rates[name][-1], 1), "tokens/s; alone", round(alone_rates[-1], 1), flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    turns = {name: [arrived(per_second, turn) for turn in found] for name, found in asked.items()}
    whole = {name: arrived(per_second, [one for turn in found for one in turn]) for name, found in asked.items()}
    p99 = {name: found["first_token_seconds"]["p99"] for name, found in whole.items()}
    burst_shares = {name: shares(found) for name, found in at_once.items()}
    return {
        "tokens_per_second": {"alone": alone_rates, **rates},
        "ours_over_alone": median["ours"] / statistics.median(alone_rates),
        "ours_over_vllm_server": median["ours"] / median["vllm_server"],
        "burst_first_token_seconds": burst_shares,
        "burst_first_token_p99_over_vllm_server": burst_shares["ours"]["p99"] / burst_shares["vllm_server"]["p99"],
        "arriving": whole,
        "arriving_by_turn": turns,
        "first_token_p99_over_vllm_server": p99["ours"] / p99["vllm_server"],
    }


def shares(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


async def arrivals(url: str, model: str, per_second: float, count: int) -> list[Timed | None]:
    """Requests that arrive whether or not the ones before are answered; None for those that were refused with 429."""
    draw = random.Random(7)
    async with client(url) as http:

        async def one(prompt: str) -> Timed | None:
            try:
                return await timed(http, model, prompt)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 429:
                    raise
                return None

        running = []
        for prompt in prompts(count, seed=2):
            running.append(asyncio.create_task(one(prompt)))
            await asyncio.sleep(draw.expovariate(per_second))
        return await asyncio.gather(*running)


def arrived(per_second: float, asked: list[Timed | None]) -> dict[str, Any]:
    """What became of such requests."""
    answers = [answer for answer in asked if answer is not None]
    good = sum(answer.first <= FIRST_SECONDS and answer.each <= EACH_SECONDS for answer in answers)
    return {
        "requests_per_second": per_second,
        "answered": len(answers),
        "refused_429": len(asked) - len(answers),
        "first_token_seconds": shares([answer.first for answer in answers]),
        "token_seconds": shares([answer.each for answer in answers]),
        "within_goal": good / len(asked),
    }


def load(run: Run, repeats: int) -> dict[str, Any]:
    """Latency at 0.4, 0.6 and 0.8 of the throughput."""
    with served(run, 8101) as url:
        asyncio.run(burst(url, run.name))
        most = asyncio.run(burst(url, run.name))[0] / NEW_TOKENS
        rates = [share * most for share in (0.4, 0.6, 0.8)]
        found = [arrived(rate, asyncio.run(arrivals(url, run.name, rate, 20 * repeats))) for rate in rates]
    return {"goal_seconds": {"first": FIRST_SECONDS, "each": EACH_SECONDS}, "most_per_second": most, "loads": found}


async def one_token(url: str, model: str, count: int) -> list[float]:
    """Seconds of each of some requests for one token, one after the other."""
    found = []
    async with client(url) as http:
        for _ in range(count):
            began = time.perf_counter()
            asked = {"model": model, "prompt": "The people", "max_tokens": 1, "temperature": 0}
            (await http.post("/v1/completions", json=asked)).raise_for_status()
            found.append(time.perf_counter() - began)
    return found


PLAIN = """
import sys, uvicorn
from pathlib import Path
import torch
from distft.serving.api import create
from distft.serving.replica import proven
torch.set_num_threads(int(sys.argv[3]))
service, _ = proven(sys.argv[1], Path(sys.argv[2]), max_new_tokens=512, concurrent=16, waiting=64)
uvicorn.run(create(service, None, page=None), port=int(sys.argv[4]), log_config=None, lifespan="off")
"""


def hop(run: Run, repeats: int) -> dict[str, Any]:
    """Seconds of a request for one token, with Ray Serve between and without."""
    with served(run, 8102) as url:
        asyncio.run(one_token(url, run.name, 10))
        through = asyncio.run(one_token(url, run.name, 20 * repeats))
    command = [sys.executable, "-c", PLAIN, run.name, str(run.export), str(os.cpu_count()), "8103"]
    process = subprocess.Popen(command)
    try:
        url = "http://127.0.0.1:8103"
        for _ in range(120):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            time.sleep(1)
        asyncio.run(one_token(url, run.name, 10))
        without = asyncio.run(one_token(url, run.name, 20 * repeats))
    finally:
        process.terminate()
        process.wait()
    medians = {"through_ray_serve": statistics.median(through), "one_process": statistics.median(without)}
    return {"median_seconds": medians, "hop_seconds": medians["through_ray_serve"] - medians["one_process"]}


def soak(run: Run, minutes: float, kill_every: float | None) -> dict[str, Any]:
    """See :mod:`benchmarks.serve_soak`."""

    async def measured(url: str) -> dict[str, Any]:
        async with client(url) as http:
            return await soaked(http, run.name, WORDS.split(), minutes, kill_every)

    with served(run, 8104) as url:
        return asyncio.run(measured(url))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("what", choices=["throughput", "hop", "load", "vllm", "soak"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30, help="soak: how long")
    parser.add_argument("--kill-every", type=float, metavar="SECONDS", help="soak: SIGKILL a replica so often")
    parser.add_argument("--out", type=Path, default=BASELINE)
    arguments = parser.parse_args()
    run, what = Run(arguments.run.resolve()), arguments.what
    if what == "soak":
        measured = soak(run, arguments.minutes, arguments.kill_every)
        what = "soak" if arguments.kill_every is None else "soak_with_kills"
    else:
        measured = {"throughput": throughput, "hop": hop, "load": load, "vllm": vllm}[what](run, arguments.repeats)
    known = read_json(arguments.out) if arguments.out.exists() else {}
    write_json(arguments.out, {**known, what: {"provenance": provenance(), **measured}})
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()

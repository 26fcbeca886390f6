"""Where the time of a training step goes, and what of it no change of ours could save.

``python -m benchmarks.step_profile`` trains SmolLM2-135M as benchmarks/peers.py does (ZeRO-2, two ranks of one thread,
a row of 1,024 tokens a pass) and tells seconds of rank 0: its passes by the model alone, which torch's profiler divides
into matrix products, attention and the rest; the update; and what ZeRO and its exchanges add. Beside them stands what
the products would take at the machine's measured rate for the model's own shapes, two processes at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import inputs
from benchmarks.provenance import provenance
from benchmarks.short_runs import ROOT, torchrun
from distft import engine as engines
from distft.model import DTYPES, IGNORED, Batch, LossModel, flops_per_token, load_model
from distft.world import World

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("flash_attention", "segment_attention")


def batches(path: str) -> list[Batch]:
    """The rows, each a micro-batch."""
    file = np.load(path)
    found = []
    for ids, positions, labels in zip(file["input_ids"], file["position_ids"], file["labels"], strict=True):
        next_labels = np.append(labels[1:], IGNORED)
        found.append(Batch(*(torch.from_numpy(column)[None] for column in (ids, positions, next_labels))))
    return found


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """The median, after one time that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def product_rate(model: torch.nn.Module, tokens: int) -> float:
    """FLOPs a second of the layers' products, forward and backward, by themselves."""
    flops = seconds = 0.0
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    for weight in {tuple(layer.weight.shape): layer.weight.detach() for layer in layers}.values():
        states, gradients = (weight.new_ones(tokens, size) for size in reversed(weight.shape))
        for left, right in ((states, weight.t()), (gradients, weight), (gradients.t(), states)):
            seconds += seconds_of(partial(torch.mm, left, right), 5)
            flops += 2 * tokens * weight.numel()
    return flops / seconds


def alone(model: LossModel, batch: Batch, repeats: int) -> dict[str, Any]:
    """A pass by the model alone: seconds, and what they divide into."""

    def once() -> None:
        loss, _ = model(batch)
        loss.backward()
        model.zero_grad()

    seconds = seconds_of(once, repeats)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        once()
    own = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    products = sum(own.get(name, 0) for name in PRODUCTS)
    attention = sum(taken for name, taken in own.items() if any(word in name for word in ATTENTION))
    rest = {
        name: taken for name, taken in own.items() if name not in PRODUCTS and not any(w in name for w in ATTENTION)
    }
    largest = dict(sorted(rest.items(), key=lambda item: -item[1])[:8])
    return {
        "seconds": seconds,
        "profiled": {"products": products, "attention": attention, "rest": sum(rest.values()), "largest": largest},
    }


def rank(arguments: argparse.Namespace) -> None:
    """One of the ranks; the first prints a line of JSON."""
    world = World.from_environment()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(Path(arguments.model), DTYPES[arguments.dtype])
    rows, tokens = batches(arguments.file), arguments.tokens
    passes = arguments.batch_size // world.size
    rate = product_rate(model, tokens)
    least = passes * tokens * flops_per_token(model, 0) / rate
    loss_model = LossModel(model, compiled=arguments.compiled)
    loss_model.train()
    one = alone(loss_model, rows[world.rank], arguments.steps)
    engine = engines.open(loss_model, engines.Settings(dtype=DTYPES[arguments.dtype], stage=2), world)
    kept: dict[str, list[float]] = {"passes": [], "update": []}
    for number in range(arguments.steps + 1):
        began = time.perf_counter()
        for turn in range(passes):
            row = rows[(number * arguments.batch_size + turn * world.size + world.rank) % len(rows)]
            engine.forward_backward(row, 1e-4, last=turn == passes - 1, seed=turn)
        passed = time.perf_counter()
        engine.step(1e-5)
        kept["passes"].append(passed - began)
        kept["update"].append(time.perf_counter() - passed)
    whole, update = (statistics.median(kept[name][1:]) for name in ("passes", "update"))
    engine.close()
    engines.leave()
    if world.is_main:
        step = whole + update
        found = {
            "step_seconds": step,
            "passes": passes,
            "pass_alone": one,
            "update_seconds": update,
            "zero_seconds": whole - passes * one["seconds"],
            "product_flops_per_second": rate,
            "products_at_that_rate_seconds": least,
            "share_of_that_rate": least / step,
        }
        print(json.dumps(found), flush=True)


def as_table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: seconds of a step, and their parts."""
    lines = ["| | step | products | attention | rest of the passes | ZeRO | update | products' least, share |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, one in found.items():
        parts = one["pass_alone"]["profiled"]
        passes = one["passes"] * one["pass_alone"]["seconds"]
        products, attention = (one["passes"] * parts[part] for part in ("products", "attention"))
        told = (one["step_seconds"], products, attention, passes - products - attention)
        told = (*told, one["zero_seconds"], one["update_seconds"], one["products_at_that_rate_seconds"])
        cells = " | ".join(f"{seconds:.1f} s" for seconds in told)
        lines.append(f"| {name} | {cells}, {one['share_of_that_rate']:.0%} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command line; a rank gets what follows ``--file`` too."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__.split("\n\n")[0])
    made.add_argument("--job", type=Path, default=ROOT / "launch" / "quickstart.yaml")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--rows", nargs="+", choices=("full", "packed"), default=["full", "packed"], help="see peers.py")
    made.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    made.add_argument("--batch-size", type=int, default=4, help="rows of a step, over both ranks")
    made.add_argument("--steps", type=int, default=4, help="steps that are timed, and passes")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "step-profile.json")
    for name in ("--file", "--model"):
        made.add_argument(name, help=argparse.SUPPRESS)
    made.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Profiles full and packed rows, with and without compiled layers."""
    arguments = parser().parse_args()
    if arguments.file is not None:
        rank(arguments)
        return
    found = {}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as scratch:
            asked = argparse.Namespace(**{**vars(arguments), "rows": rows}, seed=17)
            model, file, facts = inputs(asked, Path(scratch))
            words = ["-m", "benchmarks.step_profile", "--file", str(file), "--model", str(model)]
            for name in ("dtype", "tokens", "batch_size", "steps"):
                words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
            for name, more in ((rows, []), (f"{rows}, compiled", ["--compiled"])):
                lines = torchrun(Path(sys.executable), *words, *more).splitlines()
                found[name] = {**json.loads(next(line for line in lines[::-1] if line.startswith("{"))), "rows": facts}
                print(name, json.dumps(found[name]), flush=True)
    document = {"provenance": provenance(), "tokens": arguments.tokens, "dtype": arguments.dtype, "found": found}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(as_table(found))


if __name__ == "__main__":
    main()

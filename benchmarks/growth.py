"""How cost grows with the rows of the data: processor seconds of each part of a job at 1, 10 and 100 times as many.

``python -m benchmarks.growth`` prepares documents of 5 to 400 characters for a tiny model whose tokens are bytes, packs
lengths, plans, starts a worker that makes one step and saves, verifies that save, audits a run that used every row, and
reports one of as many steps. It fails where something grows by more than ``n log n`` from 10 to 100 times.

The exponent is the slope between the two larger sizes: 1 is linear, and whatever is the same at each size pulls it to
0. It must stay below that of ``n log n`` there, about 1.08, and what caches and a busy machine add. Seconds are those
that the processor worked, in all threads and in processes that a part started, not those that it waited.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.provenance import provenance
from distft.checkpoint import storage_of
from distft.checkpoint.layout import newest_sound
from distft.config import Job
from distft.data.packing import pack
from distft.data.store import Prepared
from distft.ledger.audit import audit
from distft.ledger.plan import Plan, plan_of
from distft.report.page import write as write_report
from distft.runs import Run, write_json
from distft.task.prepare import prepare
from distft.train.folder import begin, job_of
from distft.train.worker import work
from distft.world import World
from tests.distributed import tiny
from tests.unit.tiny_runs import run_of

ROOT = Path(__file__).parents[1]
#: Lengths that are packed for each document: packing as many as there are takes no time.
LENGTHS_A_DOCUMENT = 100
#: What caches, and a machine that does other things too, may add to a slope.
SLACK = 0.12
#: The clock's step.
CLOCK_SECONDS = 0.01
#: What takes less at the largest size is not judged: it is too short to measure.
LEAST_SECONDS = 0.1


def once(documents: int, folder: Path) -> dict[str, float]:
    """Seconds of each part for so many documents, in a folder that is new."""
    os.environ["DISTFT_CACHE"] = str(folder / "cache")
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began = sum(os.times()[:4])  # of this process and its children, in the kernel too
        yield
        seconds[part] = sum(os.times()[:4]) - began

    tiny.make_model(folder / "model")
    tiny.make_corpus(folder / "corpus.jsonl", documents)
    settings = ["data.splits={validation: 0.02, test: 0.02}", "evaluate.samples=16"]
    job = tiny.job(folder, *settings, train={"steps": 1, "batch_size": 7})
    with timed("prepare"):
        prepared = prepare(job, folder / "model")
    lengths = np.random.default_rng(1).integers(1, 1024, documents * LENGTHS_A_DOCUMENT).astype(np.int32)
    pack(lengths, 1024)  # a virtual machine takes more time to give memory for the first time than packing does
    with timed("pack 100 lengths a document"):
        pack(lengths, 1024)
    run = begun(job, prepared, tiny.run_of(folder, "trained"))
    shutil.copy(run.job, folder / "job.yaml")
    with timed("plan, the whole command"):
        command = [sys.executable, "-m", "distft", "plan", str(folder / "job.yaml"), "--json"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with timed("a worker: start, step, two saves"):
        work(job, World(), run, prepared, folder / "model", kind="plain")
    with timed("verify a checkpoint"):
        newest, problems = newest_sound(storage_of(job, run), bytes.fromhex(run.key.read_text()))
    assert newest is not None, problems
    whole = epoch_of(
        tiny.job(folder, *settings, train={"epochs": 1, "batch_size": 7}), prepared, tiny.run_of(folder, "whole")
    )
    with timed("audit"):
        assert audit(plan_of(job_of(whole), whole), whole).sound
    long = run_of("language_modeling", folder / "runs" / "long", steps=documents)
    with timed("report of a step a document"):
        write_report(long)
    return seconds


def begun(job: Job, prepared: Path, run: Run) -> Run:
    """The run, with what is there before its workers start."""
    begin(job, run)
    write_json(run.card, Prepared.open(prepared).card)
    return run


def epoch_of(job: Job, prepared: Path, run: Run) -> Run:
    """A run whose log tells that it used every row once."""
    planned = Plan.of(job, Prepared.open(prepared))
    begun(job, prepared, run)
    with run.metrics.open("w", encoding="utf-8") as file:
        for step in range(1, planned.order.steps + 1):
            digest = planned.digest(planned.step(step))
            line = {"kind": "train", "step": step, "loss": 1.0, "sample_digest": digest, "world_size": 1}
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"kind": "event", "event": "finished", "step": planned.order.steps}) + "\n")
    return run


def slope(times: Mapping[int, float]) -> float:
    """By which power of the size the seconds grow, between the two largest sizes."""
    (small, few), (large, many) = sorted(times.items())[-2:]
    return math.log(max(many, CLOCK_SECONDS) / max(few, CLOCK_SECONDS)) / math.log(large / small)


def allowed(sizes: Sequence[int]) -> float:
    """The slope of ``n log n`` between the two largest sizes, and some slack."""
    small, large = sorted(sizes)[-2:]
    return slope({small: small * math.log2(small), large: large * math.log2(large)}) + SLACK


def main(words: Sequence[str] | None = None) -> None:
    """Measures every size some times, and writes the least seconds of each part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000, 10_000, 100_000], metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "growth.json")
    arguments = parser.parse_args(words)
    sizes = sorted(arguments.documents)
    least: dict[str, dict[int, float]] = {}
    for size in sizes:
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as folder:
                for part, seconds in once(size, Path(folder)).items():
                    known = least.setdefault(part, {})
                    known[size] = min(seconds, known.get(size, math.inf))
    limit = allowed(sizes)
    parts = {part: {"seconds": times, "exponent": round(slope(times), 3)} for part, times in least.items()}
    document = {"provenance": provenance(), "limit": round(limit, 3), "parts": parts}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{'seconds of':34s}" + "".join(f"{size:>12,}" for size in sizes) + f"{'exponent':>10s}")
    for part, times in least.items():
        print(f"{part:34s}" + "".join(f"{times[size]:12.2f}" for size in sizes) + f"{slope(times):10.2f}")
    worse = [part for part, times in least.items() if times[sizes[-1]] > LEAST_SECONDS and slope(times) > limit]
    if worse:
        sys.exit(f"worse than n log n (exponent {limit:.2f}): {', '.join(worse)}")


if __name__ == "__main__":
    main()

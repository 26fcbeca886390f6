"""What Ray adds to a step: the same worker started by Ray, and by torchrun, in turn.

``python -m benchmarks.overhead --workers 1 2`` trains SmolLM2-135M with ZeRO-2 on so many ranks of one thread for some
steps, through ``distft train``, and under torchrun. Losses must be the same to the last bit; the first step of each run
is not timed. The ratio is told of each pair of runs, and its median with a 95 % bootstrap interval over pairs; beside
it that of the medians of all timed steps. Where ranks fill the machine, they share it with Ray's own processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.provenance import provenance
from benchmarks.scaling import interval
from benchmarks.short_runs import settings, torchrun
from distft.runs import training_curve

ROOT = Path(__file__).parents[1]


def run(way: str, workers: int, repeat: int, arguments: argparse.Namespace, runs: Path) -> list[dict[str, float]]:
    """Trains under ``ray`` or ``torchrun``; the curve."""
    name = f"{way}-{workers}-{repeat}"
    words = [str(arguments.job), "--name", name, "--runs", str(runs)]
    for setting in (*settings(arguments), "train.compile=false", f"cluster.workers={workers}"):
        words += ["--set", setting]
    if way == "torchrun":
        torchrun(Path(sys.executable), "-m", "distft.train", *words, ranks=workers)
    else:
        command = [sys.executable, "-m", "distft", "train", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return training_curve(runs / name / "metrics.jsonl")


def measured(workers: int, arguments: argparse.Namespace, runs: Path) -> dict[str, object]:
    """The medians of all runs, and what Ray's are of torchrun's."""
    seconds: dict[str, list[list[float]]] = {"ray": [], "torchrun": []}
    for repeat in range(arguments.repeats):
        curves = {}
        for way in sorted(seconds, reverse=repeat % 2 == 1):  # who comes first takes turns
            curves[way] = run(way, workers, repeat, arguments, runs)
            seconds[way].append([step["step_seconds"] for step in curves[way][1:]])
        if [step["loss"] for step in curves["ray"]] != [step["loss"] for step in curves["torchrun"]]:
            sys.exit(f"losses differ in repeat {repeat}")
        told = ", ".join(f"{way} {statistics.median(found[-1]):.3f} s" for way, found in seconds.items())
        print(f"{workers} workers, {repeat}: {told}", flush=True)
    medians = {way: [statistics.median(steps) for steps in found] for way, found in seconds.items()}
    ratios = [ray / plain for ray, plain in zip(medians["ray"], medians["torchrun"], strict=True)]
    median, low, high = interval(ratios)
    whole = {way: statistics.median(step for steps in found for step in steps) for way, found in seconds.items()}
    of_all = whole["ray"] / whole["torchrun"]
    print(f"{workers} workers: a step through Ray takes {median:.3f} of one under torchrun ({low:.3f} to {high:.3f})")
    print(f"by the medians of all steps {of_all:.3f}")
    ratio = {"median": median, "low": low, "high": high, "pairs": ratios, "of_all_steps": of_all}
    return {"step_seconds": seconds, "ratio": ratio}


def main() -> None:
    """See the module."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--job", type=Path, default=ROOT / "launch" / "quickstart.yaml")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    made.add_argument("--batch-size", type=int, default=4, help="rows of a step, over all ranks")
    made.add_argument("--steps", type=int, default=8, help="steps of a run; the first is not timed")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--seed", type=int, default=17, help="of the order of rows")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "overhead.json")
    arguments = made.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    asked = {name: getattr(arguments, name) for name in ("dtype", "tokens", "batch_size", "steps")}
    with tempfile.TemporaryDirectory() as scratch:
        for workers in arguments.workers:
            found = measured(workers, arguments, Path(scratch))
            known[f"{workers} workers"] = {"provenance": provenance(), **asked, **found}
    arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""distft beside its peers on the same model, rows, ranks and type of numbers: speed, memory, and losses.

``python -m benchmarks.peers`` trains SmolLM2-135M with ZeRO-2 on two ranks of one thread, a row of 1,024 tokens a pass:
distft, a loop written by hand, transformers' Trainer, TRL's SFTTrainer and Ray's DeepSpeed example, the peers in
virtual environments of their own, made at the first run (1.5 GB each). All get the same rows in the same order, each a
single text that fills it, so that nobody pads, and isolating texts in a row, which only some do, changes nothing: the
losses of the same step must agree. Speed is over the steps after the first; memory is the most that a rank held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from benchmarks.throughput import ours, peer, settings, summary
from distft.config import Job
from distft.data.order import Order
from distft.data.store import Prepared, Rows
from distft.model import materialise
from distft.task.prepare import prepare
from distft.world import cache_folder

ROOT = Path(__file__).parents[1]
COMMON = ("transformers==5.23.0", "deepspeed==0.19.8", "torch==2.13.0", "ninja")
#: Seeds that are looked through for one with which a run meets full rows only.
SEEDS = 100_000


@dataclass(frozen=True)
class Peer:
    """Somebody else's way of training.

    Attributes:
        script: In benchmarks/peers; it prints a JSON line.
        home: The name of its environment.
        packages: What that holds.
        ranks: Whether torchrun starts its ranks; else it does so itself.
    """

    script: str
    home: str
    packages: tuple[str, ...]
    ranks: bool = True


PEERS = {
    "bare_deepspeed": Peer("bare_deepspeed.py", "transformers", (*COMMON, "accelerate")),
    "transformers": Peer("transformers_trainer.py", "transformers", (*COMMON, "accelerate")),
    "trl": Peer("trl_sft.py", "trl", ("trl==1.16.0", *COMMON, "datasets")),
    "ray": Peer("ray_deepspeed.py", "ray", ("ray[train]==2.60.0", *COMMON), ranks=False),
}


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The Python of an environment of these packages, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()
    return python


def full_rows(rows: Rows, job: Job) -> tuple[int, list[int]]:
    """A seed with which every row of the run is a single text that fills it, and those rows in order."""
    length = job.data.max_tokens
    full = np.array([rows[index].segments == (length,) for index in range(len(rows))])
    for seed in range(SEEDS):
        order = Order.of(job.model_copy(update={"seed": seed}), len(rows))
        indices = np.concatenate(order.first(order.steps))
        if full[indices].all():
            return seed, indices.tolist()
    sys.exit(
        f"{full.mean():.0%} of the rows are full, and no seed takes only those: fewer --steps, or shorter --tokens"
    )


def inputs(arguments: argparse.Namespace, scratch: Path) -> tuple[Path, Path, dict[str, float]]:
    """The model's folder, the rows in a .npy file, (rows, T), and facts of them; the seed goes into the arguments."""
    job = Job.load(arguments.job, settings(arguments))
    model = materialise(job.model, job.folder)
    rows = Prepared.open(prepare(job, model)).rows("train")
    arguments.seed, indices = full_rows(rows, job)
    np.save(scratch / "rows.npy", np.stack([rows[index].input_ids for index in indices]).astype(np.int64))
    lengths = [length for index in range(len(rows)) for length in rows[index].segments]
    padding = 1 - sum(lengths) / (len(lengths) * arguments.tokens)
    return model, scratch / "rows.npy", {"padding_with_a_text_a_row": padding}


def by_itself(one: Peer, python: Path, arguments: argparse.Namespace, model: Path, rows: Path) -> dict[str, Any]:
    """A run of a peer that starts its ranks itself."""
    words = ["--model", str(model), "--rows", str(rows), "--steps", str(arguments.steps), "--dtype", arguments.dtype]
    command = [str(python), str(ROOT / "benchmarks" / "peers" / one.script), *words]
    command += ["--batch-size", str(arguments.batch_size)]
    changed = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **changed}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))
    return found


def last_losses(seen: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The first and the last step's losses of each, medians over repeats, and the last's distance from ours."""
    first = {name: statistics.median(run["losses"][0] for run in runs) for name, runs in seen.items()}
    last = {name: statistics.median(run["losses"][-1] for run in runs) for name, runs in seen.items()}
    return {
        name: {"first": first[name], "last": last[name], "last_over_ours": last[name] / last["ours"] - 1}
        for name in seen
    }


def as_table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| | supervised tokens/s | ours over it | peak memory of a rank | ours over it | loss at the last step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rate in result["supervised_tokens_per_second"].items():
        over = result["ours_over"].get(name)
        ratios = ("", "") if over is None else (f"{over['speed']:.2f}", f"{over['memory']:.2f}")
        memory, losses = result["peak_memory_bytes_per_rank"][name], result["losses"][name]
        lines.append(
            f"| {name} | {rate:,.0f} | {ratios[0]} | {memory / 1e9:.2f} GB | {ratios[1]} "
            f"| {losses['last']:.4f} ({losses['last_over_ours']:+.1e}) |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n\n")[0])
    made.add_argument("--job", type=Path, default=ROOT / "launch" / "quickstart.yaml")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    made.add_argument("--batch-size", type=int, default=4, help="rows of a step, over both ranks")
    made.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not timed")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--seed", type=int, default=17, help=argparse.SUPPRESS)  # replaced, see full_rows
    made.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, help="peers; all by default")
    made.add_argument("--environments", type=Path, default=cache_folder() / "benchmarks", help="a folder for them")
    made.add_argument("--out", type=Path, help="[benchmarks/baselines/peers-DTYPE.json]")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Runs all in turn, repeat by repeat, so that a slow hour does not fall on one of them; writes the results."""
    arguments = parser().parse_args(words)
    pythons = {
        name: environment(arguments.environments / PEERS[name].home, PEERS[name].packages) for name in arguments.only
    }
    seen: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model, rows, facts = inputs(arguments, scratch)
        for repeat in range(arguments.repeats):
            seen.setdefault("ours", []).append(ours(arguments, scratch, repeat, compiled=False))
            print("ours", json.dumps(seen["ours"][-1]), flush=True)
            for name, python in pythons.items():
                one = PEERS[name]
                if one.ranks:
                    out = ("--out", str(scratch / name))
                    found = peer(one.script, python, arguments, model, rows, *out)
                else:
                    found = by_itself(one, python, arguments, model, rows)
                seen.setdefault(name, []).append(found)
                print(name, json.dumps(found), flush=True)
    result = {**summary(seen, (arguments.tokens - 1) * arguments.batch_size), "losses": last_losses(seen), **facts}
    setting = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str)}
    packages = {name: PEERS[name].packages for name in arguments.only}
    document = {"provenance": provenance(), "peers": packages, "setting": setting, **result, "runs": seen}
    path = arguments.out or ROOT / "benchmarks" / "baselines" / f"peers-{arguments.dtype}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(as_table(result))


if __name__ == "__main__":
    main()

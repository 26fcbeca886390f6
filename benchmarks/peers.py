"""distft beside its peers on the same model, texts, ranks and type of numbers: speed, memory, and losses.

``python -m benchmarks.peers`` trains SmolLM2-135M with ZeRO-2 on two ranks of one thread, a row of 1,024 tokens a pass:
distft with and without compiled layers, a loop written by hand, transformers' Trainer, TRL's SFTTrainer and Ray's
DeepSpeed example, the peers in virtual environments of their own, made at the first run (1.5 GB each). Speed is of
the steps after the first; memory is the most that a rank held.

- ``--rows full``: each row is a single text that fills it, so that nobody pads, and isolating texts in a row, which
  only some do, changes nothing: the losses of the same step must agree.
- ``--rows packed``: rows of paragraphs. All get the rows that distft packed, with positions that keep texts apart, but
  TRL, which packs the same texts itself. Ray's example, which pads each text to a row, is left out.

With ``--same-settings`` peers get the settings of ZeRO too that distft chooses on CPUs: its small buckets, and no
scattering of sums. Otherwise they have DeepSpeed's own, as their users have who do not tune them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing import paragraphs
from benchmarks.provenance import provenance
from benchmarks.short_runs import ROOT, command_output, settings, torchrun
from distft.config import Job
from distft.data.order import Order
from distft.data.store import Prepared, Rows
from distft.model import IGNORED, Batch, materialise
from distft.plan.memory import BUCKET
from distft.runs import training_curve
from distft.task.prepare import prepare
from distft.world import cache_folder

COMMON = ("transformers==5.23.0", "deepspeed==0.19.8", "torch==2.13.0", "ninja")
#: What distft sets of DeepSpeed's ``zero_optimization`` on CPUs, where that changes time and memory alone.
OUR_ZERO = {"reduce_bucket_size": BUCKET["cpu"], "reduce_scatter": False}
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
        packs: Whether it trains on rows of several texts.
    """

    script: str
    home: str
    packages: tuple[str, ...]
    ranks: bool = True
    packs: bool = True


PEERS = {
    "bare_deepspeed": Peer("bare_deepspeed.py", "transformers", (*COMMON, "accelerate")),
    "transformers": Peer("transformers_trainer.py", "transformers", (*COMMON, "accelerate")),
    "trl": Peer("trl_sft.py", "trl", ("trl==1.16.0", *COMMON, "datasets")),
    "ray": Peer("ray_deepspeed.py", "ray", ("ray[train]==2.60.0", *COMMON), ranks=False, packs=False),
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


def inputs(arguments: argparse.Namespace, scratch: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The model's folder, the run's rows in a .npz file, and facts of them.

    The file holds ``input_ids``, ``position_ids`` and ``labels``, all (rows, T), the last as transformers takes them,
    and ``tokens``, (rows,): how many of a row are no padding. Into the arguments goes what the run's settings are.
    """
    arguments.settings = settings(arguments)
    if arguments.rows == "packed":
        texts = scratch / "paragraphs.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs()), encoding="utf-8")
        arguments.settings.append(f"data.source={texts}")
    job = Job.load(arguments.job, arguments.settings)
    model = materialise(job.model, job.folder)
    rows = Prepared.open(prepare(job, model)).rows("train")
    if arguments.rows == "full":
        seed, indices = full_rows(rows, job)
        arguments.settings.append(f"seed={seed}")
    else:
        order = Order.of(job, len(rows))
        indices = np.concatenate(order.first(order.steps)).tolist()
    chosen = [rows[index] for index in indices]
    batch = Batch.collate(chosen, pad_id=0, width=arguments.tokens)
    supervised = np.zeros(batch.input_ids.shape, bool)
    for row, one in enumerate(chosen):
        supervised[row, : len(one.supervised)] = one.supervised
    ids = batch.input_ids.numpy()
    np.savez(
        scratch / "rows.npz",
        input_ids=ids,
        position_ids=batch.position_ids.numpy(),
        labels=np.where(supervised, ids, IGNORED),
        tokens=[len(one.input_ids) for one in chosen],
    )
    lengths = [length for index in range(len(rows)) for length in rows[index].segments]
    facts = {
        "supervised_tokens": supervised.sum(1).reshape(arguments.steps, -1).sum(1).tolist(),
        "texts_of_a_row": statistics.mean(len(one.segments) for one in chosen),
        "padding_with_a_text_a_row": 1 - sum(lengths) / (len(lengths) * arguments.tokens),
    }
    return model, scratch / "rows.npz", facts


def ours(arguments: argparse.Namespace, scratch: Path, name: str, *, compiled: bool) -> dict[str, Any]:
    """One training run of ours, with layers compiled or not."""
    chosen = [*arguments.settings, f"train.compile={str(compiled).lower()}"]
    overrides = [word for setting in chosen for word in ("--set", setting)]
    words = ["-m", "distft.train", str(arguments.job), "--name", name, "--runs", str(scratch), *overrides]
    torchrun(Path(sys.executable), *words)
    curve = training_curve(scratch / name / "metrics.jsonl")
    return {
        "step_seconds": [line["step_seconds"] for line in curve],
        "losses": [line["loss"] for line in curve],
        "supervised_tokens": [line["supervised_tokens"] for line in curve],
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in curve),
    }


def theirs(name: str, python: Path, arguments: argparse.Namespace, model: Path, rows: Path) -> dict[str, Any]:
    """A run of a peer's script, which prints a line of JSON."""
    one = PEERS[name]
    words = [str(ROOT / "benchmarks" / "peers" / one.script), "--model", str(model), "--rows", str(rows)]
    words += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
    words += ["--dtype", arguments.dtype, "--zero", json.dumps(OUR_ZERO if arguments.same_settings else {})]
    words += ["--out", str(rows.parent / name)]
    output = torchrun(python, *words) if one.ranks else command_output([str(python), *words], python, PYTHONPATH="")
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines()[::-1] if line.startswith("{")))
    return found


def summary(seen: dict[str, list[dict[str, Any]]], supervised: Sequence[int]) -> dict[str, Any]:
    """Medians over all steps but each run's first, and ours as a ratio to each peer's.

    Args:
        seen: Runs of each.
        supervised: Supervised tokens of each step, for those that do not tell their own.
    """
    rate = {
        name: statistics.median(
            tokens / seconds
            for run in runs
            for tokens, seconds in list(
                zip(run.get("supervised_tokens", supervised), run["step_seconds"], strict=True)
            )[1:]
        )
        for name, runs in seen.items()
    }
    memory = {name: statistics.median(run["peak_memory_bytes"] for run in runs) for name, runs in seen.items()}
    return {
        "supervised_tokens_per_second": rate,
        "peak_memory_bytes_per_rank": memory,
        **{
            f"{mine}_over": {
                name: {"speed": rate[mine] / rate[name], "memory": memory[mine] / memory[name]}
                for name in seen
                if name != mine
            }
            for mine in ("ours", "ours_compiled")
            if mine in seen
        },
    }


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
        "| | supervised tokens/s | ours over it | compiled | memory of a rank | ours over it | compiled | last loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rate in result["supervised_tokens_per_second"].items():
        over = [result.get(mine, {}).get(name) for mine in ("ours_over", "ours_compiled_over")]
        speed, memory = (["" if one is None else f"{one[what]:.2f}" for one in over] for what in ("speed", "memory"))
        losses = result["losses"][name]
        lines.append(
            f"| {name} | {rate:,.0f} | {' | '.join(speed)} | {result['peak_memory_bytes_per_rank'][name] / 1e9:.2f} GB "
            f"| {' | '.join(memory)} | {losses['last']:.4f} ({losses['last_over_ours']:+.1e}) |"
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
    made.add_argument("--seed", type=int, default=17, help=argparse.SUPPRESS)  # another is looked for, see full_rows
    made.add_argument("--rows", choices=("full", "packed"), default="full", help="one text a row, or paragraphs")
    made.add_argument("--same-settings", action="store_true", help="peers get our settings of ZeRO")
    made.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, help="peers; all by default")
    made.add_argument("--environments", type=Path, default=cache_folder() / "benchmarks", help="a folder for them")
    made.add_argument("--out", type=Path, help="[benchmarks/baselines/peers-ROWS-DTYPE[-same-settings].json]")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Runs all in turn, repeat by repeat, so that a slow hour does not fall on one of them; writes the results."""
    arguments = parser().parse_args(words)
    names = [name for name in arguments.only if PEERS[name].packs or arguments.rows == "full"]
    pythons = {name: environment(arguments.environments / PEERS[name].home, PEERS[name].packages) for name in names}
    seen: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model, rows, facts = inputs(arguments, scratch)
        runs: dict[str, Callable[[int], dict[str, Any]]] = {
            "ours": lambda repeat: ours(arguments, scratch, f"ours-{repeat}", compiled=False),
            "ours_compiled": lambda repeat: ours(arguments, scratch, f"compiled-{repeat}", compiled=True),
        }
        for name, python in pythons.items():
            runs[name] = lambda _, name=name, python=python: theirs(name, python, arguments, model, rows)
        for repeat in range(arguments.repeats):
            for name, once in runs.items():
                seen.setdefault(name, []).append(once(repeat))
                print(name, json.dumps(seen[name][-1]), flush=True)
    result = {**summary(seen, facts["supervised_tokens"]), "losses": last_losses(seen), "rows": facts}
    setting = {name: value for name, value in vars(arguments).items() if isinstance(value, int | str)}
    packages = {name: PEERS[name].packages for name in names}
    document = {"provenance": provenance(), "peers": packages, "setting": setting, **result, "runs": seen}
    named = f"peers-{arguments.rows}-{arguments.dtype}{'-same-settings' if arguments.same_settings else ''}.json"
    path = arguments.out or ROOT / "benchmarks" / "baselines" / named
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(as_table(result))


if __name__ == "__main__":
    main()

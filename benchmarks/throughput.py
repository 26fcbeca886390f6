"""Supervised tokens a second and peak memory of training: distft, a bare DeepSpeed loop, and TRL's SFTTrainer.

``python benchmarks/throughput.py`` runs them in turn, distft with and without compiled layers, each under torchrun on
the same machine, model and rows: SmolLM2-135M, rows of 1,024 tokens, ZeRO-2, two ranks of one thread. Every figure is
taken over the steps after the first. TRL gets a virtual environment of its own (``--trl-environment``), made at the
first run.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from distft.config import Job  # noqa: E402
from distft.runs import training_curve  # noqa: E402
from distft.world import cache_folder  # noqa: E402

TRL_PACKAGES = ("trl==1.16.0", "transformers==5.23.0", "deepspeed==0.19.8", "torch==2.13.0", "ninja", "datasets")


def settings(arguments: argparse.Namespace) -> list[str]:
    """The quickstart's model and text, cut and trained as this benchmark wants."""
    return [
        f"data.max_tokens={arguments.tokens}",
        f"train.batch_size={arguments.batch_size}",
        "train.micro_batch_size=1",
        f"train.steps={arguments.steps}",
        "train.learning_rate=1e-5",
        "train.schedule={kind: constant, warmup: 0.0}",
        "train.validate_every=1.0",
        "data.splits={validation: 0.0, test: 0.0}",
        "checkpoint.every=1.0",
        "track.tensorboard=false",
        "zero.stage=2",
        f"model.dtype={arguments.dtype}",
        f"seed={arguments.seed}",
    ]


def torchrun(python: Path, *words: str, ranks: int = 2) -> str:
    """Runs ranks of one thread; standard output of all."""
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    # The environment's own tools (ninja) come first: DeepSpeed compiles an extension in the peers' loops.
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def ours(arguments: argparse.Namespace, scratch: Path, repeat: int, *, compiled: bool) -> dict[str, Any]:
    """One training run of ours, with layers compiled or not."""
    chosen = [*settings(arguments), f"train.compile={str(compiled).lower()}"]
    overrides = [word for setting in chosen for word in ("--set", setting)]
    name = f"{'compiled' if compiled else 'ours'}-{repeat}"
    words = ["-m", "distft.train", str(arguments.job), "--name", name, "--runs", str(scratch), *overrides]
    torchrun(Path(sys.executable), *words)
    curve = training_curve(scratch / name / "metrics.jsonl")
    return {
        "step_seconds": [line["step_seconds"] for line in curve],
        "losses": [line["loss"] for line in curve],
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in curve),
    }


def peer(
    script: str, python: Path, arguments: argparse.Namespace, model: Path, rows: Path, *more: str
) -> dict[str, Any]:
    """One run of a peer's script; it prints a JSON line."""
    words = ["--model", str(model), "--rows", str(rows), "--steps", str(arguments.steps), "--dtype", arguments.dtype]
    words += ["--batch-size", str(arguments.batch_size), *more]
    output = torchrun(python, str(ROOT / "benchmarks" / "peers" / script), *words)
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines()[::-1] if line.startswith("{")))
    return found


def trl_python(folder: Path) -> Path:
    """The Python of TRL's environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *TRL_PACKAGES], check=True)
    return python


def inputs(arguments: argparse.Namespace, scratch: Path) -> tuple[Path, Path, int]:
    """The model's folder, the training rows that are full as a .npy file (B, T), and supervised tokens of a row."""
    import numpy as np

    from distft.data.store import Prepared
    from distft.model import materialise
    from distft.task.prepare import prepare

    job = Job.load(arguments.job, settings(arguments))
    model = materialise(job.model, job.folder)
    rows = Prepared.open(prepare(job, model)).rows("train")
    full = [row.input_ids for row in rows if row.segments == (arguments.tokens,)]
    path = scratch / "rows.npy"
    np.save(path, np.stack(full[: arguments.steps * arguments.batch_size]).astype(np.int64))
    return model, path, arguments.tokens - 1


def main() -> None:
    """Measures and writes ``benchmarks/baselines/throughput-DTYPE.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, default=ROOT / "launch" / "quickstart.yaml")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step, over both ranks")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=17, help="of the order of rows")
    parser.add_argument("--without", nargs="*", default=[], choices=("bare_deepspeed", "trl"))
    parser.add_argument("--trl-environment", type=Path, default=cache_folder() / "benchmarks" / "trl")
    arguments = parser.parse_args()
    seen: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model, rows, supervised = inputs(arguments, scratch)
        runs = {
            "ours": lambda repeat: ours(arguments, scratch, repeat, compiled=False),
            "ours_compiled": lambda repeat: ours(arguments, scratch, repeat, compiled=True),
            "bare_deepspeed": lambda _: peer("bare_deepspeed.py", Path(sys.executable), arguments, model, rows),
            "trl": lambda _: peer(
                "trl_sft.py",
                trl_python(arguments.trl_environment),
                arguments,
                model,
                rows,
                "--out",
                str(scratch / "trl"),
            ),
        }
        for repeat in range(arguments.repeats):
            for name, once in runs.items():
                if name not in arguments.without:
                    seen.setdefault(name, []).append(once(repeat))
                    print(name, json.dumps(seen[name][-1]), flush=True)
    result = summary(seen, supervised * arguments.batch_size)
    document = {
        "provenance": provenance(),
        "trl": TRL_PACKAGES[0],
        "setting": {name: value for name, value in vars(arguments).items() if isinstance(value, int | str)},
        **result,
        "runs": seen,
    }
    path = ROOT / "benchmarks" / "baselines" / f"throughput-{arguments.dtype}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def summary(seen: dict[str, list[dict[str, Any]]], supervised: int) -> dict[str, Any]:
    """Medians over all counted steps, and ours as a ratio to each peer's."""
    rate = {
        name: supervised / statistics.median(second for one in runs for second in one["step_seconds"][1:])
        for name, runs in seen.items()
    }
    memory = {name: statistics.median(one["peak_memory_bytes"] for one in runs) for name, runs in seen.items()}
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


if __name__ == "__main__":
    main()

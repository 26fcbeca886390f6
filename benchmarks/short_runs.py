"""Short runs of the quickstart's model under torchrun, one thread a rank: what several benchmarks time."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def settings(arguments: argparse.Namespace) -> list[str]:
    """The quickstart's model and text, cut and trained as a benchmark wants."""
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


def command_output(command: list[str], python: Path, **more: str) -> str:
    """Standard output of a command that uses an environment's Python; its tools (ninja) come first."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **more}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def torchrun(python: Path, *words: str, ranks: int = 2) -> str:
    """Runs ranks of one thread; standard output of all."""
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    return command_output(command, python, PYTHONPATH=str(ROOT))

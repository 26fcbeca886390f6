"""The same training under torchrun and in one bare process, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from distft.runs import read_lines
from tests.distributed import tiny
from tests.support import ROOT, free_port

pytestmark = pytest.mark.distributed


def start(home: Path, name: str, *arguments: str, ranks: int = 0) -> subprocess.Popen[str]:
    """Starts ``python -m distft.train``; under torchrun where ``ranks`` is given."""
    job = home / "job.yaml"
    if not job.exists():
        job.write_text(json.dumps(tiny.job(home).dump()), encoding="utf-8")  # JSON is YAML
    launcher: Sequence[str] = ["-m"]
    if ranks:
        port = str(free_port())
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port, "-m"]
    command = [sys.executable, *launcher, "distft.train", str(job), "--name", name, "--runs", str(home / "runs")]
    env = {**os.environ, "DISTFT_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    for name_of in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(name_of, None)
    return subprocess.Popen(
        [*command, *arguments], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Waits for the end; returns what was said."""
    said, _ = process.communicate(timeout=200)
    assert process.returncode == status, said
    return said


def test_invariant_2_under_torchrun_and_bare_and_through_ctrl_c(home: Path) -> None:
    under_torchrun = finish(start(home, "torchrun", "--set", "cluster.workers=2", ranks=2))
    bare = start(home, "bare")
    metrics = tiny.run_of(home, "bare").metrics
    while bare.poll() is None and sum(line["kind"] == "train" for line in read_lines(metrics)) < 3:
        time.sleep(0.02)
    bare.send_signal(signal.SIGINT)
    said = finish(bare, status=130)
    assert 3 <= len(tiny.curve(home, "bare")) < 20, said
    assert "exists already" in finish(start(home, "bare"), status=2)
    finish(start(home, "bare", "--resume"))
    curves = [tiny.curve(home, name) for name in ("torchrun", "bare")]
    assert [len(curve) for curve in curves] == [20, 20], under_torchrun
    for two, one in zip(*curves, strict=True):
        assert two["sample_digest"] == one["sample_digest"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)

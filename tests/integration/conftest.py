"""One Ray cluster for all tests of this folder that go through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distft.runs import training_curve
from tests.distributed import tiny
from tests.support import ROOT, free_port


class Home:
    """A folder with a tiny model and a corpus, and a Ray cluster to run jobs on; ``on`` is what precedes a command."""

    def __init__(self, folder: Path, address: str, on: Sequence[str] = (), metrics_port: int = 0) -> None:
        self.folder = folder
        self.address = address
        self.on = on
        self.metrics = f"http://127.0.0.1:{metrics_port}/metrics"  # what Prometheus reads
        self.environment = {
            **os.environ,
            "DISTFT_CACHE": str(folder / "cache"),
            "DISTFT_RUNS": str(folder / "runs"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [*self.on, sys.executable, "-m", "distft", *words]
        if words[0] in ("run", "train", "search", "prepare", "chaos"):
            command += ["--set", f"cluster.address={self.address}"]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, cwd=self.folder
        )

    def distft(self, *words: str, status: int = 0, timeout: float = 300) -> tuple[str, str]:
        process = self.start(*words)
        output, errors = process.communicate(timeout=timeout)
        assert process.returncode == status, f"{words} ended with {process.returncode}\n{output}\n{errors}"
        assert not status or len(errors.splitlines()) <= 15, f"the cause is not within the last 15 lines:\n{errors}"
        return output, errors

    def curve(self, name: str) -> list[dict[str, Any]]:
        return training_curve(self.folder / "runs" / name / "metrics.jsonl")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A tiny model, a corpus, and a cluster with a temporary folder and ports of its own, ended at the end."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("home")
    tiny.make(folder)
    with_temp = tmp_path_factory.mktemp("r")  # short: Ray's socket paths must stay under 108 bytes
    port = free_port()
    head = {
        "num_cpus": 4,
        "include_dashboard": False,
        "temp_dir": str(with_temp),
        "metrics_export_port": port,
        "_system_config": {"metrics_report_interval_ms": 1000},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Home(folder, cluster.address, metrics_port=port)
    finally:
        cluster.shutdown()

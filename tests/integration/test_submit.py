"""Jobs handed over HTTP to a real cluster, which asks for a token: a head, and a node beside it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from distft.orchestrate.train.places import read_places
from distft.runs import Run, read_json, training_curve
from tests.distributed import tiny
from tests.support import ROOT, free_port

pytestmark = pytest.mark.ray

STEPS = 200
JOB = f"""\
model: {{source: ./model, dtype: fp32}}
task: {{kind: language_modeling}}
data:
  source: corpus.jsonl
  splits: {{validation: 0.1, test: 0.1}}
  max_tokens: 32
  overlong: split
train: {{steps: {STEPS}, batch_size: 8, learning_rate: 1e-3, validate_every: {{steps: 100}}}}
checkpoint: {{every: {{steps: 1000}}}}
cluster: {{workers: 1, stall_seconds: 600}}
evaluate: {{samples: 8, compare_base: false}}
track: {{tensorboard: false}}
"""


class Remote:
    """A cluster of one node, and a client of it with a home of its own.

    Two nodes on one machine would read each other's logs, or remove what the other has unpacked.

    Args:
        folder: The client's home, with a job in it.
        temporary: Ray's.
        python: What the node runs Ray with.
    """

    def __init__(self, folder: Path, temporary: Path, python: Path = Path(sys.executable)) -> None:
        self.python, self.folder, self.runs = python, folder, folder / "shared" / "runs"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(32)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTFT_"))}
        self.nobody = {**kept, "HOME": str(folder)}
        self.environment = {**self.nobody, "RAY_AUTH_TOKEN": self.token}
        self.there = {
            **{name: value for name, value in kept.items() if name != "PYTHONPATH"},
            "PATH": f"{python.parent}:{kept['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "DISTFT_RUNS": str(self.runs),
        }
        self._temporary, self._session = temporary, 0

    def start(self) -> None:
        command = [str(self.python), "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=1"]
        command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--temp-dir={self._temporary}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}"]
        command += [f"--ray-client-server-port={free_port()}", f"--metrics-export-port={free_port()}"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        log = self.folder / "node.txt"
        with log.open("wb") as file:
            node = subprocess.Popen(command, env=self.there, stdout=file, stderr=file, start_new_session=True)
        self._session = node.pid
        assert node.wait() == 0, log.read_text()
        self._until(lambda: len(self.ask("/api/v0/nodes")["data"]["result"]["result"]) == 1)

    def end(self) -> None:
        """Ends what the node has started, which is of its session; a driver goes when its supervisor does."""
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self._session:
                    process.kill()

    def ask(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {self.token}"}).json()

    def begin(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "distft", *words, "--address", self.url]
        pipe = subprocess.PIPE
        environment = {**(environment or self.environment), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=self.folder)

    def distft(
        self, *words: str, status: int = 0, environment: dict[str, str] | None = None, seconds: float = 240
    ) -> tuple[str, str]:
        process = self.begin(*words, environment=environment)
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == status, f"{words} ended with {process.returncode}\n{output}\n{errors}"
        return output, errors

    def _until(self, condition: Any) -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                if condition():
                    return
            except (httpx.HTTPError, KeyError, TypeError, ValueError):
                pass
            time.sleep(0.2)
        raise AssertionError("the cluster did not start")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("client")
    tiny.make(folder)
    (folder / "tiny.yaml").write_text(JOB)
    cluster = Remote(folder, tmp_path_factory.mktemp("r"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


def test_who_has_no_token_or_another_one_is_told(remote: Remote) -> None:
    _, errors = remote.distft("submit", "tiny.yaml", status=4, environment=remote.nobody)
    assert "the cluster wants a token, and none is here" in errors
    assert "RAY_AUTH_TOKEN" in errors
    other = {**remote.nobody, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    _, errors = remote.distft("status", status=4, environment=other)
    assert "the cluster wants another token than the one here" in errors
    assert "Traceback" not in errors


def test_a_job_outlives_its_client_stops_with_a_checkpoint_and_goes_on(remote: Remote) -> None:
    watching = remote.begin("submit", "tiny.yaml", "--wait")
    run = Run(remote.runs / "tiny")
    metrics = run.metrics
    wait_for(lambda: len(training_curve(metrics)) >= 2, watching)
    (place,) = read_places(run, read_json(run.group))
    os.kill(place.pid, signal.SIGSTOP)  # the tiny model would be done before all this is asked
    watching.send_signal(signal.SIGINT)
    output, errors = watching.communicate(timeout=60)
    assert watching.returncode == 130, output + errors
    assert "step" not in errors
    (job,) = (line.split()[2].rstrip(".") for line in output.splitlines() if line.startswith("Submitted as"))
    assert f"distft logs {job} --follow" in errors

    known = json.loads(remote.distft("status", job, "--json")[0])
    assert (known["status"], known["run"]) == ("running", "tiny")
    told = remote.ask(f"/api/jobs/{job}")
    assert remote.token not in json.dumps(told)
    _, errors = remote.distft("submit", "tiny.yaml", status=2)
    assert f"running there already, as {job}" in errors

    stopping = remote.begin("stop", job)
    wait_for(run.stop_request.exists, stopping)
    os.kill(place.pid, signal.SIGCONT)
    output, errors = stopping.communicate(timeout=120)
    assert f"{job} is stopped" in output, output + errors
    result = read_json(metrics.with_name("result.json"))
    assert result["status"] == "interrupted"
    assert (run.checkpoints / f"step-{result['step']:06d}" / "COMPLETE").is_file()

    output, errors = remote.distft("submit", "tiny.yaml", "--resume", "--wait")
    assert "✓ evaluate on test" in output
    assert [line["step"] for line in training_curve(metrics)] == list(range(1, STEPS + 1))
    assert read_json(metrics.with_name("result.json"))["status"] == "finished"
    assert (metrics.parent / "export" / "model.safetensors").is_file()
    assert [line.split()[1] for line in remote.distft("status")[0].splitlines()] == ["stopped", "finished"]
    assert remote.token not in "".join(path.read_text() for path in remote.runs.rglob("*.json*"))


def test_a_job_ends_as_its_run_does(remote: Remote) -> None:
    """Rows that are not there make 3 of `distft run`, and of who waits for it; the run stays away."""
    words = ["submit", "tiny.yaml", "--name", "absent", "--set", "data.source=/nowhere/rows.jsonl"]
    output, errors = remote.distft(*words, "--wait", status=3)
    assert "there is no '/nowhere/rows.jsonl'" in output
    assert "failed with exit status 3" in errors
    (line,) = (line for line in remote.distft("status")[0].splitlines() if line.startswith("absent"))
    assert "failed (exit status 3)" in line
    _, errors = remote.distft("logs", "nothing", status=2)
    assert "the cluster knows no job 'nothing'" in errors


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended first\n{process.communicate()}"
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.05)

"""A cluster that starts nodes as they are asked for, by Ray's own autoscaler."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.integration.conftest import Home
from tests.support import free_port

pytestmark = pytest.mark.slow

JOB = """\
model: {source: ./model, dtype: fp32}
task: {kind: language_modeling}
data: {source: ./corpus.jsonl, max_tokens: 64, overlong: split, splits: {validation: 0.1, test: 0.1}}
train: {steps: 4, batch_size: 8}
zero: {stage: 2}
cluster: {workers: 2, wait_seconds: 120}
track: {tensorboard: false}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A head without a CPU, and an autoscaler that may start a node of two CPUs beside it."""
    folder = tmp_path_factory.mktemp("home")
    tiny.make(folder)
    (folder / "job.yaml").write_text(JOB)
    from ray.util import get_node_ip_address

    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    worker = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "growing",
        "max_workers": 1,
        "provider": {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True},
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 0.1,
        # `ray up` would fill these in.
        **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{"auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False},
    }
    autoscaling = folder / "autoscaling.json"
    autoscaling.write_text(json.dumps(config))
    command = ["ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    command += [f"--autoscaling-config={autoscaling}", "--include-dashboard=false"]
    command += [f"--temp-dir={tmp_path_factory.mktemp('r')}"]
    ours = Home(folder, address)
    ours.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**ours.environment, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while "runtime started" not in (folder / "ray.log").read_text():
            assert time.monotonic() < until, (folder / "ray.log").read_text()
            time.sleep(0.5)
        yield ours
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_nodes_are_asked_for_and_waited_for(home: Home) -> None:
    output, _ = home.distft("train", "job.yaml", "--name", "grown", timeout=400)
    assert "asked the cluster for 2 workers of 1 CPU" in output
    assert [line["world_size"] for line in home.curve("grown")] == [2] * 4


def test_what_never_comes_is_refused_when_the_wait_is_over(home: Home) -> None:
    settings = ["--set", "cluster.workers=3", "--set", "cluster.wait_seconds=5"]
    _, errors = home.distft("train", "job.yaml", "--name", "too-many", *settings, status=4)
    assert "3 workers of 1 CPU are asked for" in errors
    assert not (Path(home.environment["DISTFT_RUNS"]) / "too-many" / "metrics.jsonl").exists()

"""Nodes that cannot work together are named before a run begins, and by ``distft doctor``: real Ray nodes.

The second one has another version of distft on its path, and a clock of its own; where the test is root's, it also sees
another folder in place of the runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.integration.conftest import Home
from tests.integration.test_survive import JOB, Cluster
from tests.support import ROOT

pytestmark = pytest.mark.ray

MAY_MOUNT = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("unshare") is not None
DISTFT_9 = "Metadata-Version: 2.1\nName: distft\nVersion: 9.9.9\n"
#: What Python runs as it starts, where it finds it on its path: an hour behind.
CLOCK = "import time\n_now = time.time\ntime.time = lambda: _now() - 3600\n"


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A head, and a node that does not fit it."""
    folder, planted = tmp_path_factory.mktemp("sick"), tmp_path_factory.mktemp("planted")
    tiny.make(folder)
    (folder / "tiny.yaml").write_text(JOB)
    (folder / "runs").mkdir()
    (planted / "distft-9.9.9.dist-info").mkdir()
    (planted / "distft-9.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: distft\nVersion: 9.9.9\n"
    )
    (planted / "sitecustomize.py").write_text(CLOCK)
    cluster = Cluster(tmp_path_factory.mktemp("r"))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.ray.address}"]
    command += ["--num-cpus=1", "--block", "--disable-usage-stats"]
    if MAY_MOUNT:
        command = [
            "unshare",
            "-m",
            "sh",
            "-c",
            'mount -t tmpfs tmpfs "$0" && exec "$@"',
            str(folder / "runs"),
            *command,
        ]
    with (folder / "node.log").open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": f"{planted}{os.pathsep}{ROOT}"}
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for_nodes(cluster.ray.address, 2, node, folder / "node.log")
        yield Home(folder, cluster.ray.address)
    finally:
        node.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(30)
        node.kill()
        cluster.ray.shutdown()


def wait_for_nodes(address: str, count: int, node: subprocess.Popen[bytes], log: Path) -> None:
    from ray._raylet import GcsClient

    client, end = GcsClient(address=address), time.monotonic() + 120
    while sum(info.state == 0 for info in client.get_all_node_info().values()) < count:
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def test_a_run_is_refused_before_anything_is_made_and_the_node_is_named(sick: Home) -> None:
    _, errors = sick.distft("train", "tiny.yaml", status=4)
    assert "Traceback" not in errors
    assert re.search(r"[\d.]+ \(\S+\): other versions: distft 9\.9\.9, the driver has 0\.1\.0\n", errors), errors
    assert re.search(r"its clock is 3(599|600)\.\d s behind the driver's", errors), errors
    assert "constraints.txt" in errors
    runs = sick.folder / "runs"
    if MAY_MOUNT:
        assert f"does not see what the driver writes there: {runs}" in errors
        assert "set --runs or DISTFT_RUNS" in errors
    assert list(runs.iterdir()) == [], "neither a run nor what was tried is left"


def test_the_doctor_finds_the_same_and_what_the_machine_can_do(sick: Home) -> None:
    output, errors = sick.distft("doctor", "--address", sick.address, "--json", status=4)
    found = json.loads(output)
    problems = {one["topic"] for one in found["findings"] if one["level"] == "problem"}
    assert problems == {"versions", "clock", *(["storage"] if MAY_MOUNT else [])}, errors
    assert all(one["fix"] for one in found["findings"] if one["level"] != "fine")
    fine = {one["topic"]: one["text"] for one in found["findings"] if one["level"] == "fine"}
    assert re.fullmatch(r"two processes over gloo at .*: 4\.0 MB summed in \d+ ms", fine["collective"])
    assert {"versions", "device", "dtype", "memory", "disk", "port", "Ray", "node", "network"} <= set(fine)
    assert [link["bytes_per_second"] > 1e6 for link in found["network"]] == [True, True]
    assert not found["well"]


@pytest.mark.slow
def test_a_machine_that_is_well(home: Home) -> None:
    """One node: what `distft doctor` says in a terminal, and that a cluster which is not there is told."""
    output, errors = home.distft("doctor", "--address", home.address)
    assert "All is well." in output
    assert "Traceback" not in errors
    output, _ = home.distft("doctor", "--address", "127.0.0.1:1", status=4)
    assert "no Ray cluster answers: nobody listens at 127.0.0.1:1" in output

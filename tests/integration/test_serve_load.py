"""Served models under load that comes and goes, and on clusters that lose their parts."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.certificate import read
from tests.integration.conftest import Home
from tests.integration.servers import JOB, Clients, Server, replicas, served
from tests.support import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def runs(home: Home) -> Path:
    """A run, ``first``, and ``elastic``: the same, to be served by 0 to 2 replicas."""
    (home.folder / "served.yaml").write_text(JOB)
    folder = home.folder / "runs"
    if not (folder / "first" / "export").exists():  # by other tests with the same home
        home.distft("run", "served.yaml", "--name", "first")
    shutil.copytree(folder / "first", folder / "elastic")
    resolved = json.loads((folder / "elastic" / "resolved.json").read_text())
    resolved["job"]["serve"] |= {"replicas": {"min": 0, "max": 2}, "idle_seconds": 15.0}
    (folder / "elastic" / "resolved.json").write_text(json.dumps(resolved))
    return folder


def wait(until: Callable[[], object], what: str, seconds: float = 180) -> float:
    """Waits for something; the seconds that it took."""
    began = time.monotonic()
    while not until():
        assert time.monotonic() < began + seconds, what
        time.sleep(0.5)
    return time.monotonic() - began


@pytest.mark.slow
def test_replicas_come_with_load_and_go_with_quiet_and_no_request_is_lost(home: Home, runs: Path) -> None:
    first = read(runs / "first" / "export")
    with served(home, "tiny=elastic") as server:
        assert len(list(replicas())) == 1
        with Clients(server, 40) as clients:
            grown = wait(lambda: len(list(replicas())) == 2, "no second replica came")
            time.sleep(20)
        assert set(clients.statuses) == {200}
        with Clients(server, 1) as alone:
            fewer = wait(lambda: len(list(replicas())) == 1, "the second replica stayed")
        assert set(alone.statuses) == {200}
        none = wait(lambda: not list(replicas()), "the last replica stayed")
        print(f"{len(clients.statuses)} requests; a second replica after {grown:.0f} s, gone after {fewer:.0f} s")

        time.sleep(5)
        assert server.ready()
        (model,) = server.http.get("/v1/models").json()["data"]
        assert model["ready"]
        began = time.monotonic()
        assert server.answers_as(first)
        print(f"none {none:.0f} s later; the next request was answered after {time.monotonic() - began:.1f} s")

        wait(lambda: not list(replicas()), "the last replica stayed")
        output, _ = home.distft("serve", "tiny=first", "--update", "--address", home.address)
        assert "prompts with equal ids" in output
        assert server.answers_as(first)


@pytest.mark.slow
def test_who_does_not_read_holds_no_place(home: Home, runs: Path) -> None:
    with served(home, "tiny=first") as server, asking(server):
        held = wait(lambda: not told(server, "distft_requests_running"), "who does not read holds a place")
        written = told(server, "distft_tokens_total", 'kind="completion"')
        print(f"places are free {held:.1f} s after the first token; {written:.0f} were written, and nobody has read")
        assert written > 1000


@contextlib.contextmanager
def asking(server: Server) -> Iterator[None]:
    """Somebody who reads the first piece of 32 long answers, two batches full, and no more until he leaves."""
    asked = {"model": "tiny", "prompt": ["the people"] * 4, "n": 8, "max_tokens": 100, "logprobs": 5, "temperature": 1}
    with server.http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # who lets go of it leaves
        first = next(lines)
        assert "choices" in first, first
        yield


def told(server: Server, name: str, label: str = "") -> float:
    """One of the server's metrics, those of a label together."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and label in line)


@pytest.mark.slow
def test_a_server_whose_models_another_process_takes_down_says_so_and_ends(home: Home, runs: Path) -> None:
    with served(home, "tiny=first") as server:
        code = f"import ray; ray.init({home.address!r}); from ray import serve; serve.delete('distft')"
        subprocess.run([sys.executable, "-c", code], env=home.environment, check=True, timeout=120)
        check_lost(server, "took the models down")
    with served(home, "tiny=first") as again:  # at another port
        assert again.answers_as(read(runs / "first" / "export"))


@pytest.mark.slow
def test_applications_of_others_are_left_alone(home: Home, runs: Path) -> None:
    code = f"""
import ray
from ray import serve
ray.init({home.address!r})
@serve.deployment(ray_actor_options={{"num_cpus": 0}})
class Theirs: ...
serve.start(proxy_location="Disabled")
serve.run(Theirs.bind(), name="theirs", route_prefix="/theirs")
"""
    subprocess.run([sys.executable, "-c", code], env=home.environment, check=True, timeout=120)
    _, errors = home.distft("serve", "first", "--port", str(free_port()), "--address", home.address, status=2)
    assert "other applications, which would end with these models: ['theirs']" in errors
    code = f"import ray; ray.init({home.address!r}); from ray import serve; print(list(serve.status().applications)); "
    code += "serve.shutdown()"
    told = subprocess.run(
        [sys.executable, "-c", code], env=home.environment, check=True, timeout=120, capture_output=True
    )
    assert b"['theirs']" in told.stdout


def check_lost(server: Server, why: str) -> None:
    """It ends within some time with one clear line."""
    _, errors = server.process.communicate(timeout=150)
    assert server.process.returncode == 5, errors
    *_, line, fix = errors.strip().splitlines()  # before them, Ray's own log may complain of a lost cluster
    assert line.startswith("distft: "), errors
    assert why in line
    assert fix.strip() == "serve again, once there is a cluster"
    assert "Traceback" not in errors


class Nodes:
    """Ray nodes on this machine: a head where no replica fits, and others of two CPUs."""

    def __init__(self, folder: Path, others: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder)}
        self.ray = Cluster(initialize_head=True, head_node_args=head)
        self.others = [self.ray.add_node(num_cpus=2) for _ in range(others)]

    def of(self, pid: int) -> Any:
        """The node of a process."""
        import psutil

        parents = [parent.pid for parent in psutil.Process(pid).parents()]
        return next(node for node in self.others if node.all_processes["raylet"][0].process.pid in parents)


@contextlib.contextmanager
def serving_nodes(home: Home, folder: Path, others: int) -> Iterator[tuple[Nodes, Server]]:
    made = Nodes(folder, others)
    try:
        with served(Home(home.folder, made.ray.address), "tiny=first") as server:
            yield made, server
    finally:
        made.ray.shutdown()


@pytest.mark.slow
def test_a_node_that_is_killed_hangs_no_request(
    home: Home, runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with serving_nodes(home, tmp_path_factory.mktemp("r"), 2) as (cluster, server):
        (replica,) = replicas()
        with Clients(server) as clients:
            time.sleep(2)
            cluster.ray.remove_node(cluster.of(replica.pid), allow_graceful=False)
            count = len(clients.statuses)
            took = wait(lambda: 200 in clients.statuses[count + 8 :] and list(replicas()), "it stays away")
            time.sleep(1)
        told = {status: clients.statuses.count(status) for status in set(clients.statuses)}
        print(f"answered again {took:.0f} s after the node was killed; {told}")
        assert set(clients.statuses) <= {200, 503}
        assert server.answers_as(read(runs / "first" / "export"))


@pytest.mark.slow
def test_a_server_whose_cluster_is_lost_says_so_and_ends(
    home: Home, runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with serving_nodes(home, tmp_path_factory.mktemp("r"), 1) as (cluster, server):
        began = time.monotonic()
        cluster.ray.remove_node(cluster.ray.head_node, allow_graceful=False)
        check_lost(server, "head is lost")
        print(f"it ended {time.monotonic() - began:.0f} s after its head")


@pytest.mark.slow
def test_ctrl_c_ends_a_server_whose_head_is_silent(
    home: Home, runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with serving_nodes(home, tmp_path_factory.mktemp("r"), 1) as (cluster, server):
        began = time.monotonic()
        cluster.ray.remove_node(cluster.ray.head_node, allow_graceful=False)
        time.sleep(3)  # it does not know yet
        server.process.send_signal(signal.SIGINT)
        _, errors = server.process.communicate(timeout=150)
        print(f"it ended {time.monotonic() - began:.0f} s after its head")
        assert server.process.returncode == 5, errors
        assert "the cluster's head has not answered" in errors
        assert "Traceback" not in errors

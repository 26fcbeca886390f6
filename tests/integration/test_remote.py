"""Jobs handed to a cluster of three hosts (``host.sh``): who may, what stays secret, and what a run outlives.

The client is a machine beside them. Each host has a CPU, the head too: a job of three workers has a rank on each.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from distft.orchestrate.train.places import Place, read_places
from distft.runs import Run, read_json, read_lines, training_curve
from tests.distributed import tiny
from tests.integration.test_hosts import HEAD, SCRIPT, Hosts
from tests.integration.test_hosts import pytestmark as marks
from tests.support import ROOT, start_ranks, wait_for_ranks
from tests.unit.test_credentials import Guarded

pytestmark = marks

STEPS = 120
JOB = f"""\
model: {{source: ./model, dtype: fp32}}
task: {{kind: language_modeling}}
data: {{source: ./corpus.jsonl, max_tokens: 64, overlong: split, splits: {{validation: 0.1, test: 0.1}}}}
train: {{steps: {STEPS}, batch_size: 12, micro_batch_size: 2, learning_rate: 1e-3, validate_every: {{steps: 60}}}}
zero: {{stage: 3}}
checkpoint: {{every: {{steps: 20}}}}
cluster: {{workers: {{min: 1, max: 3}}, stall_seconds: 300}}
evaluate: {{samples: 8, compare_base: false}}
track: {{tensorboard: false}}
"""
BIN = Path(sys.executable).parent
#: What stands in the environment of the nodes, and nowhere else.
PLANTED = {"HF_TOKEN": f"hf_{secrets.token_hex(17)}", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
#: What other machines are answered: without a token, with another one, with the right one.
ANSWERS = {"none": 401, "wrong": 403, "right": 200}

GCS = "from ray._raylet import GcsClient; print(len(GcsClient(address='{head}:6379').get_all_node_info()), 'nodes')"
CLIENT = "import ray; ray.init('ray://{head}:10001'); print(len(ray.nodes()), 'nodes')"
DRIVER = "import ray; ray.init('{head}:6379'); print(len(ray.nodes()), 'nodes')"


class Remote:
    """The cluster, and who hands jobs to it: a process outside of its hosts, with a home of its own."""

    def __init__(self, folder: Path, files: Path) -> None:
        self.files, self.runs = files, files / "runs"
        self.token = secrets.token_hex(32)
        head = ["--num-cpus=1", "--dashboard-host=0.0.0.0"]
        self.hosts = Hosts(
            folder,
            head,
            RAY_AUTH_TOKEN=self.token,
            RAY_gcs_storage="memory",
            RAY_gcs_rpc_server_reconnect_timeout_s="60",
            PATH=f"{BIN}:{os.environ['PATH']}",
            OMP_NUM_THREADS="1",
            DISTFT_RUNS=str(self.runs),
            DISTFT_CACHE=str(files / "cache"),
            **PLANTED,
        )
        self.head = self.hosts.address.partition(":")[0]
        self.url = f"http://{self.head}:8265"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTFT_"))}
        self.environment = {**kept, "HOME": str(folder), "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": self.token}
        self.hosts.boot(0, 1, 2)
        until = time.monotonic() + 120
        while self.status("right", "/api/jobs/") != 200:
            assert time.monotonic() < until, "the dashboard does not answer"
            time.sleep(1)

    def headers(self, who: str) -> dict[str, str]:
        tokens = {"wrong": secrets.token_hex(32), "right": self.token}
        return {"Authorization": f"Bearer {tokens[who]}"} if who in tokens else {}

    def status(self, who: str, path: str, content: Any = None, host: str | None = None) -> int:
        """Of an answer over HTTP; 0 where there is none."""
        method, url = "GET" if content is None else "POST", f"{host or self.url}{path}"
        try:
            return httpx.request(method, url, json=content, headers=self.headers(who), timeout=30).status_code
        except httpx.HTTPError:
            return 0

    def ask(self, who: str, code: str, on: list[str]) -> str:
        """What a process of Ray's says that knows this token."""
        tokens = {"wrong": secrets.token_hex(32), "right": self.token, "none": ""}
        environment = {
            **self.environment,
            "RAY_AUTH_TOKEN": tokens[who],
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        }
        environment["RAY_AUTH_MODE"] = "disabled" if who == "none" else "token"
        command = [*on, sys.executable, "-c", code.format(head=self.head)]
        environment |= {name: self.hosts.environment[name] for name in ("HOSTS_DIR", "HOSTS_NET")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert (done.returncode == 0) == (who == "right"), f"{who}: {code}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def begin(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "distft", *words, "--address", self.url]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self.environment, cwd=self.files)

    def distft(self, *words: str, status: int = 0, seconds: float = 400) -> tuple[str, str]:
        process = self.begin(*words)
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == status, f"{words} ended with {process.returncode}\n{output}\n{errors}"
        return output, errors

    def submit(self, name: str, *words: str) -> str:
        """A job's id."""
        output, _ = self.distft("submit", "tiny.yaml", "--name", name, *words)
        return next(line.split()[2].rstrip(".") for line in output.splitlines() if line.startswith("Submitted as"))

    def places(self, run: Run) -> list[Place]:
        return read_places(run, max(read_json(path)["attempt"] for path in run.logs.glob("rank-*.json")))

    def end(self) -> None:
        self.hosts.script("clean")


def wait(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come in time"
        time.sleep(0.1)


def steps(run: Run) -> int:
    return len(training_curve(run.metrics)) if run.metrics.exists() else 0


def sizes(run: Run) -> list[int]:
    """The numbers of workers, one after the other, of all steps that were made: some are made again."""
    lines = [line for line in read_lines(run.metrics) if line["kind"] == "train"]
    return [size for size, _ in itertools.groupby(line["world_size"] for line in lines)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.make(folder)
    (folder / "tiny.yaml").write_text(JOB)
    return folder


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("hosts")
    made = None
    try:
        made = Remote(folder, files)
        yield made
    finally:
        if made is None:
            subprocess.run(["bash", SCRIPT, "clean"], env={**os.environ, "HOSTS_DIR": str(folder)}, check=True)
        else:
            made.end()


@pytest.fixture(scope="module")
def expected(files: Path) -> list[dict[str, Any]]:
    """The curve of one process on one machine, without Ray."""
    command = [sys.executable, "-m", "distft.train", str(files / "tiny.yaml"), "--name", "alone"]
    command += ["--runs", str(files / "alone")]
    environment = {"DISTFT_CACHE": str(files / "cache")}
    ranks = wait_for_ranks(start_ranks(command, 1, files, environment), files, 240)
    assert ranks.statuses == [0], ranks
    return training_curve(files / "alone" / "alone" / "metrics.jsonl")


def check_curve(run: Run, expected: list[dict[str, Any]]) -> None:
    curve = training_curve(run.metrics)
    assert [line["step"] for line in curve] == list(range(1, STEPS + 1))
    assert [line["sample_digest"] for line in curve] == [line["sample_digest"] for line in expected]
    for ours, theirs in zip(curve, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]


def test_who_has_no_token_is_refused_at_every_door(remote: Remote) -> None:
    """The Jobs API and the dashboard over HTTP, the tables of the head, Ray's client, and a driver on another host."""
    looks = ["/api/jobs/", "/nodes?view=summary", "/api/cluster_status", "/api/v0/actors", "/api/v0/logs"]
    for who, answer in ANSWERS.items():
        found = {path: remote.status(who, path) for path in looks}
        told = [path for path, status in found.items() if status != answer]
        assert not told or who == "right", (who, found)
        assert found["/api/jobs/"] == found["/nodes?view=summary"] == answer, (who, found)
        assert remote.status(who, "/api/jobs/", {"entrypoint": "true"}) == answer, who
    for host in (f"http://{remote.head}:52365", f"http://{remote.head.removesuffix('0')}1:52365"):  # of each node
        for who in ("none", "wrong"):
            job = {"entrypoint": "true", "submission_id": "theirs"}
            assert remote.status(who, "/api/job_agent/jobs/", job, host) in (0, 401, 403), (host, who)
    there = ["bash", SCRIPT, "run", "1"]
    doors: list[tuple[str, list[str]]] = [(GCS, []), (CLIENT, []), (DRIVER, there)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = {(code, who): pool.submit(remote.ask, who, code, on) for code, on in doors for who in ANSWERS}
        said = {key: future.result() for key, future in asked.items()}
    assert {key: text.strip() for key, text in said.items() if key[1] == "right"} == {
        (code, "right"): "3 nodes" for code, _ in doors
    }
    assert not [text for key, text in said.items() if key[1] != "right" and "nodes" in text]
    _, errors = remote.distft("submit", "tiny.yaml", "--dry-run")
    assert remote.token not in errors


def test_a_job_says_which_secret_is_missing_before_workers_start(remote: Remote) -> None:
    """Of Weights & Biases, MLflow and a bucket; the nodes have none of them."""
    with ThreadingHTTPServer((f"{remote.head.rpartition('.')[0]}.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://{server.server_address[0]!s}:{server.server_port}"
        cases = {
            "wandb": ("track.wandb=waves", "no WANDB_API_KEY is here"),
            "mlflow": (f"track.mlflow={address}", "MLFLOW_TRACKING_PASSWORD"),
        }
        for name, (setting, secret) in cases.items():
            output, errors = remote.distft("submit", "tiny.yaml", "--name", name, "--set", setting, "--wait", status=2)
            assert secret in output, output + errors
            assert "Traceback" not in output + errors
            assert not (remote.runs / name).exists()
        server.shutdown()


def test_a_run_outlives_a_cut_off_host_and_a_lost_one(remote: Remote, expected: list[dict[str, Any]]) -> None:
    """From three hosts to two, to three and to two again; and nothing secret is told meanwhile."""
    remote.hosts.mend()
    run = Run(remote.runs / "three")
    id = remote.submit("three")
    wait(lambda: steps(run) >= 10, "the tenth step")
    places = remote.places(run)
    assert len({place.host for place in places}) == 3, places
    check_processes(remote)
    driver = json.loads(remote.distft("status", id, "--json")[0])["node"]
    number = {1, 2}.difference({remote.hosts.number_of(driver)}).pop()
    print(f"the driver is on {driver}; host {number} is cut off after step {steps(run)}")
    remote.hosts.cut(number)
    wait(lambda: 2 in sizes(run), "a step of two workers")
    standing = next(place for place in remote.places(run) if place.host != driver)
    there = str(remote.hosts.number_of(standing.host))
    remote.hosts.script("run", there, "kill", "-STOP", str(standing.pid))  # the tiny model would be done before
    remote.hosts.join(number)
    wait(run.stop_request.exists, "the request to grow")
    remote.hosts.script("run", there, "kill", "-CONT", str(standing.pid))
    wait(lambda: sizes(run)[-2:] == [2, 3], "a step of three workers again")
    at = steps(run)
    print(f"host {number} loses its power after step {at}")
    remote.hosts.down(number)
    output, _ = remote.distft("logs", id, "--follow")
    assert "✓ evaluate on test" in output
    assert sizes(run) == [3, 2, 3, 2]
    assert read_json(run.result)["status"] == "finished"
    check_curve(run, expected)
    check_files(remote, run)


def test_a_run_whose_head_is_lost_goes_on_on_another_cluster(
    tmp_path_factory: pytest.TempPathFactory, remote: Remote, files: Path, expected: list[dict[str, Any]]
) -> None:
    remote.hosts.mend()
    run = Run(remote.runs / "headless")
    remote.submit("headless")
    wait(lambda: steps(run) >= 45, "step 45")
    print(f"the head loses its power after step {steps(run)}")
    for number in (HEAD, 1, 2):
        remote.hosts.down(number)
    remote.end()
    other = Remote(tmp_path_factory.mktemp("other"), files)
    try:
        output, _ = other.distft("submit", "tiny.yaml", "--name", "headless", "--resume", "--wait")
    finally:
        other.end()
    assert "✓ evaluate on test" in output
    assert {line["world_size"] for line in training_curve(run.metrics)} == {3}
    begun = [line["reason"] for line in read_lines(run.metrics) if "workers" in line]
    print(begun[-1])
    assert "from the checkpoint of step" in begun[-1]
    check_curve(run, expected)


def check_processes(remote: Remote) -> None:
    """No secret in the arguments of any process, nor in what another user sees of their environments."""
    hidden = [remote.token, *PLANTED.values()]
    assert any(secret.encode() in environment() for secret in hidden), "the nodes' environment has them"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = path.read_bytes()
        except OSError:
            continue
        assert not [secret for secret in hidden if secret.encode() in said], said
    nobody = [shutil.which("setpriv") or "setpriv", "--reuid=65534", "--clear-groups"]
    shown = subprocess.run([*nobody, "ps", "axeww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "raylet" in shown
    assert not [secret for secret in hidden if secret in shown]


def environment() -> bytes:
    """That of all processes that may be read."""
    found = b""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += path.read_bytes()
        except OSError:
            continue
    return found


def check_files(remote: Remote, run: Run) -> None:
    """No secret in the run's folder, what was sent, the caches, nor in Ray's own folders, logs among them."""
    hidden = {name: secret.encode() for name, secret in {"the token": remote.token, **PLANTED}.items()}
    sessions = Path(remote.hosts.environment["HOSTS_DIR"])
    logs = [path for path in sessions.glob("ray*/session_*/logs/**/*") if path.is_file()]
    assert len(logs) > 30
    told = []
    for path in itertools.chain(remote.files.rglob("*"), sessions.rglob("*")):
        with contextlib.suppress(OSError):  # of a cluster that lives
            content = path.read_bytes() if path.is_file() else b""
            told += [f"{name} in {path}" for name, secret in hidden.items() if secret in content]
    assert told == []
    assert (run.folder / "export" / "model.safetensors").is_file()

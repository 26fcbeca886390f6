"""What is sent to a cluster, how it starts there, and what a person is told of it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distft.cli.submission import last_line, next_lines, parcel_lines, status_line
from distft.config import InvalidJob, UnusableFiles
from distft.errors import CapacityError, JobError
from distft.orchestrate.cluster import MARKET, Node
from distft.orchestrate.submission import parcel as parcel_module
from distft.orchestrate.submission.driver import prepare
from distft.orchestrate.submission.jobs import NODE, Cluster, Submitted, _Told, driver_labels, tail, url_of
from distft.orchestrate.submission.parcel import Order, Parcel, extras_of, installation, parcel
from tests.support import ROOT, free_port

JOB = """\
model: {source: %(model)s}
task: {kind: language_modeling}
data:
  source: %(data)s
  overlong: split
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as they lie beside a job file in ``launch/``, and what must not be sent."""
    for name in ("launch/data/a.txt", "launch/data/b.txt", "launch/data/.secret.txt", "other/c.jsonl", "unused.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("config.json", "model.safetensors", ".cache"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path


def packed(folder: Path, model: str = "gpt2", data: str = "data/*.txt", **options: Any) -> Parcel:
    path = folder / "launch" / "job.yaml"
    path.write_text(JOB % {"model": model, "data": data})
    return parcel(path, **options)


def sent(made: Parcel) -> list[str]:
    return sorted(name.removeprefix("job/") for name in made.files if name.startswith("job/"))


def test_the_relative_files_of_a_job_travel_with_it(folder: Path) -> None:
    assert sent(packed(folder)) == ["data/a.txt", "data/b.txt", "job.yaml"]
    assert sent(packed(folder, data="data")) == ["data/a.txt", "data/b.txt", "job.yaml"]
    assert sent(packed(folder, data="[data/a.txt, {source: data/b.txt, weight: 2}]"))[:2] == [
        "data/a.txt",
        "data/b.txt",
    ]


def test_files_above_the_job_file_lie_there_as_they_do_here(folder: Path) -> None:
    made = packed(folder, model="../model", data="../other/c.jsonl")
    assert sent(made) == ["launch/job.yaml", "model/config.json", "model/model.safetensors", "other/c.jsonl"]
    assert made.order.job == "launch/job.yaml"


def test_what_an_absolute_path_or_an_address_names_is_the_clusters(folder: Path) -> None:
    for data in ("/nowhere/rows.jsonl", "~/nowhere/*.jsonl", "s3://bucket/rows/*.jsonl", "hf://owner/name"):
        assert sent(packed(folder, data=data, model="/nowhere/model")) == ["job.yaml"]
    with pytest.raises(UnusableFiles, match=r"job\.yaml:4.*no file matches 'rows/\*\.txt'"):
        packed(folder, data="rows/*.txt")


def test_every_mistake_is_told_before_anything_is_sent(folder: Path) -> None:
    with pytest.raises(InvalidJob) as wrong:
        packed(folder, settings=["train.steps=0", "model.dtpe=bf16"], name="../elsewhere")
    assert len(wrong.value.problems) == 3
    assert wrong.value.exit_status == 2
    with pytest.raises(JobError, match="'runs' is no absolute path"):
        packed(folder, runs="runs")


def test_more_than_ray_takes_is_refused_with_the_sizes(folder: Path) -> None:
    large = folder / "launch" / "data" / "large.txt"
    large.touch()
    os.truncate(large, 101 * 2**20)  # sparse
    with pytest.raises(CapacityError) as refused:
        packed(folder)
    text = str(refused.value)
    assert "Ray takes 100 MiB: data/large.txt 101.0 MiB, " in text
    assert "all nodes see" in text


def test_an_archive_that_does_not_get_smaller_is_refused_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = packed(folder)
    monkeypatch.setattr(parcel_module, "LIMIT_BYTES", 1000)
    with pytest.raises(CapacityError, match="Ray takes"):
        made.pack(folder / "parcel.zip")


def test_the_limit_is_rays() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert parcel_module.LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE


@pytest.mark.parametrize(
    ("setting", "secret"),
    [
        ("data.source=s3://key:word@bucket/rows", "word"),
        ("model.source=hf_abcdefghijklmnopqrstuvwxyzABCDEF", "hf_abc"),
        ("checkpoint.storage=s3://AKIAABCDEFGHIJKLMNOP/x", "AKIA"),
    ],
)
def test_a_secret_is_not_sent_and_not_shown(folder: Path, setting: str, secret: str) -> None:
    with pytest.raises(JobError) as refused:
        packed(folder, settings=[setting])
    assert "looks like a secret" in str(refused.value)
    assert secret not in str(refused.value)


def test_a_secret_in_the_job_file_is_named_by_its_line(folder: Path) -> None:
    with pytest.raises(JobError, match=r"job\.yaml:4  this looks like a secret"):
        packed(folder, data="s3://key:word@bucket/rows/*.jsonl")


def test_the_same_files_make_the_same_archive_from_which_distft_runs(folder: Path, tmp_path: Path) -> None:
    made = packed(folder, runs="/shared/runs", name="one")
    made.pack(tmp_path / "a.zip")
    made.pack(tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    there = tmp_path / "there"
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert not [name for name in archive.namelist() if "__pycache__" in name or "secret" in name]
        archive.extractall(there)
    code = "import distft, distft.cli; print(distft.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(there)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert ran.stdout.strip() == str(there / "distft" / "__init__.py"), ran.stderr


def order(**fields: Any) -> Order:
    known = {"job": "tiny.yaml", "run": "one", "resume": False, "settings": [], "runs": None, "digest": "d1"}
    return Order(**{**known, **fields})


def test_the_driver_keeps_the_files_beside_the_runs_and_runs_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISTFT_RUNS", "DISTFT_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "tiny.yaml").write_text("model:\n")
    runs = tmp_path / "runs"
    wanted = order(runs=str(runs), resume=True, settings=["train.steps=3", "cluster.address=local"])
    for _ in range(2):  # a second job with the same files finds them
        words = prepare(wanted, tmp_path / "job")
    kept = runs / ".sent" / "d1" / "tiny.yaml"
    assert words[:6] == ["run", str(kept), "--runs", str(runs), "--name", "one"]
    assert words[6:] == [
        "--resume",
        *("--set", "train.steps=3"),
        *("--set", "cluster.address=local"),
        *("--set", "cluster.address=auto"),
    ]
    assert kept.read_text() == "model:\n"
    assert [path.name for path in kept.parents[1].iterdir()] == ["d1"]
    assert os.environ["DISTFT_CACHE"] == str(runs / ".cache")
    assert os.environ["HF_HUB_CACHE"] == str(runs / ".cache" / "hub")


def test_a_driver_without_a_place_for_runs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTFT_RUNS", raising=False)
    with pytest.raises(JobError, match="DISTFT_RUNS on this node is not set"):
        prepare(order(), tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTFT_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(CapacityError, match="cannot be kept here"):
        prepare(order(), tmp_path)


HEAD, WORKER = Node("10.0.0.1", {"CPU": 8.0}, "head"), Node("10.0.0.2", {"CPU": 8.0}, "worker")
SPOT = Node("10.0.0.3", {"CPU": 8.0}, "spot", {MARKET: "spot"})


def test_the_driver_is_kept_off_the_head_where_there_is_another_node() -> None:
    assert driver_labels([HEAD], []) == {}
    assert driver_labels([HEAD], [WORKER]) == {NODE: "!head"}
    assert driver_labels([HEAD], [SPOT]) == {NODE: "!head"}
    assert driver_labels([HEAD], [WORKER, SPOT]) == {NODE: "!head", MARKET: "!spot"}


def test_the_labels_of_a_driver_are_words_that_ray_knows() -> None:
    from ray._private.label_utils import validate_label_selector

    head = Node("10.0.0.1", {}, "f" * 56)
    assert validate_label_selector(driver_labels([head], [WORKER, SPOT])) is None


def test_what_is_installed_is_what_the_package_asks_for(tmp_path: Path) -> None:
    """And the environment is another one where the constraints are."""
    from ray.runtime_env import RuntimeEnv

    constraints = tmp_path / "constraints.txt"
    for tool in ("uv", "pip"):
        made = []
        for text in ("torch==2.13.0", "torch==2.13.1"):
            constraints.write_text(text)
            environment = RuntimeEnv(working_dir="s3://bucket/x.zip", **installation(tool, constraints))
            made.append(environment[tool]["packages"])
        assert made[0] != made[1]
        assert made[0][0] == "--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
        assert any(package.startswith("deepspeed") for package in made[0])
        assert not [package for package in made[0] if package.startswith(("pytest", "mlflow", "wandb"))]


def test_what_a_job_needs_beside_is_installed_too(folder: Path) -> None:
    assert extras_of(packed(folder).checked) == []
    lora = "{kind: lora, quantize: nf4}"
    made = packed(folder, settings=["track.mlflow=http://mlflow:5000", f"model.adapter={lora}"])
    assert extras_of(made.checked) == ["gpu", "mlflow"]
    packages: Any = installation("uv", ROOT / "constraints.txt", extras_of(made.checked))["uv"]
    names = {re.split(r"[^\w-]", package)[0] for package in packages["packages"]}
    assert {"bitsandbytes", "mlflow-skinny", "ray", "torch"} <= names
    assert not names & {"wandb", "vllm", "pytest"}


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "s3://x", "http://user:word@head:8265", ""])
def test_other_addresses_than_a_dashboards_are_refused(address: str) -> None:
    with pytest.raises(JobError) as refused:
        url_of(address)
    assert "http://HOST:8265" in str(refused.value)
    assert "word" not in str(refused.value)


def test_the_address_of_a_dashboard_may_lack_its_scheme() -> None:
    assert url_of("head:8265") == "http://head:8265"
    assert url_of("https://head/") == "https://head"


def test_where_no_cluster_answers_the_error_says_so() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(CapacityError, match=re.escape(address)) as refused:
        Cluster(address)
    assert "Connection refused" in str(refused.value)
    assert refused.value.exit_status == 4


class Guarded(BaseHTTPRequestHandler):
    """As much of a dashboard as says who may come in: Ray's own answers (http_token_authentication.py)."""

    def do_GET(self) -> None:
        said = self.headers.get("Authorization")
        if self.path == "/api/authentication_mode":
            self.answer(200, b'{"authentication_mode": "token"}')
        else:
            self.answer(403 if said else 401, b"Forbidden" if said else b"Unauthorized")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("token", "told"), [(None, "a token, and none is here"), ("a" * 40, "another token than")])
def test_who_has_no_token_or_another_one_is_told(tmp_path: Path, token: str | None, told: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), **({"RAY_AUTH_TOKEN": token} if token else {})}
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, "-m", "distft", "status", "--address", f"127.0.0.1:{server.server_port}"]
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        server.shutdown()
    assert ran.returncode == 4, ran.stderr
    assert f"the cluster wants {told}" in ran.stderr
    assert "RAY_AUTH_TOKEN" in ran.stderr
    assert "a" * 40 not in ran.stderr


def test_a_log_that_is_read_anew_is_told_from_where_it_was_left() -> None:
    said: list[str] = []
    told = _Told(said.append)
    told(0, "one\n")
    told(4, "two\n")
    told(0, "one\ntwo\nthr")  # the connection was lost
    told(11, "ee\n")
    told(0, "one\ntwo\nthree\n")
    assert "".join(said) == "one\ntwo\nthree\n"


def test_people_are_told_where_a_run_is_and_how_to_come_back(folder: Path) -> None:
    lines = list(parcel_lines(packed(folder, runs="/shared/runs/", name="one")))
    assert lines[0].startswith("job.yaml: 2 files beside it, and distft; ")
    assert lines[1] == "The run on the cluster: /shared/runs/one"
    assert "DISTFT_RUNS" in "".join(parcel_lines(packed(folder)))
    lines = list(next_lines("one-abc", "http://head:8265"))
    assert "  distft logs one-abc --follow --address http://head:8265" in lines


def test_the_status_of_a_job_is_one_line() -> None:
    job = Submitted("one-abc", "failed", "one", "", 1000.0, 1065.0, 3, "", None)
    assert status_line(job, "distft: data.source: ...") == (
        "one-abc  failed (exit status 3)  1 min 05 s  distft: data.source: ..."
    )


def test_what_a_job_said_last_is_of_its_run_and_no_command_for_whoever_runs_it_here() -> None:
    log = "✓ report 0.4 s\n\nRun     /runs/one\nReport  /runs/one/report.html\n\nNext\n  distft generate one\n"
    assert last_line(log) == "Report  /runs/one/report.html"
    assert last_line("  step 3/12  loss 3.2\n") == "step 3/12  loss 3.2"
    assert last_line("") == ""


def test_ctrl_c_is_heeded_where_a_piece_of_the_log_comes_at_the_same_moment() -> None:
    """Python 3.11's ``asyncio.wait_for`` loses the cancellation then, and with it Ctrl-C."""

    async def interrupted_with_a_piece() -> None:
        here = asyncio.current_task()
        assert here is not None
        comes: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def pieces() -> AsyncIterator[str]:
            yield await comes
            yield "as if nothing had been"

        def now() -> None:
            comes.set_result("piece")
            here.cancel()  # what asyncio.run makes of SIGINT

        asyncio.get_running_loop().call_later(0.01, now)
        await tail(pieces(), lambda *_: None)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted_with_a_piece())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT, pytest too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("ends", ["with an error", "as if complete"])
def test_ctrl_c_is_not_hidden_by_what_a_connection_says_when_it_is_cut_off(ends: str) -> None:
    async def pieces() -> AsyncIterator[str]:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
            yield "late"
        except asyncio.CancelledError:
            if ends == "with an error":
                raise OSError("cut off") from None

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(tail(pieces(), lambda *_: None))

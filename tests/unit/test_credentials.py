"""Secrets: none in a job file; one that is missing is named before workers start."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distft.config import InvalidJob, Job
from distft.errors import CapacityError
from distft.orchestrate.nodes.access import _refusal
from distft.orchestrate.nodes.shared import Shared
from distft.train.credentials import lacking
from tests.support import free_port
from tests.unit.tiny_runs import job_of

JOB = "model: {source: gpt2}\ntask: {kind: language_modeling}\ndata: {source: rows.txt}  # %s\n"
NAMES = ("WANDB_", "MLFLOW_", "AWS_", "HF_")


class Guarded(BaseHTTPRequestHandler):
    """A server that answers who knows its password, and refuses everyone else."""

    def do_GET(self) -> None:
        known = "Basic " + base64.b64encode(b"user:word").decode()
        self.send_response(200 if self.headers["Authorization"] == known else 401)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b'{"experiments": []}')

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process without a secret: no variable, and nothing at home."""
    for name in [name for name in os.environ if name.startswith(NAMES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrstuvwxyzABCDEF", "http://user:word@mlflow:5000"])
def test_a_secret_in_a_comment_or_a_setting_is_refused_and_not_repeated(tmp_path: Path, secret: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB % secret)
    with pytest.raises(InvalidJob, match=r"job\.yaml:3  this looks like a secret") as refused:
        Job.load(path)
    assert secret not in str(refused.value)
    path.write_text(JOB % "nothing")
    with pytest.raises(InvalidJob, match=r"--set track\.mlflow  this looks like a secret") as refused:
        Job.load(path, [f"track.mlflow={secret}"])
    assert secret not in str(refused.value)
    assert Job.load(path, ["track.mlflow=http://mlflow:5000"]).track.mlflow


def test_wandb_without_a_key_is_refused(tmp_path: Path, stranger: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    job = job_of("language_modeling", tmp_path, track={"wandb": "project"})
    refused = lacking(job)
    assert refused is not None
    assert "track.wandb" in str(refused)
    assert "no WANDB_API_KEY is here" in str(refused)
    wandb.teardown()  # else it would remember these settings for other tests
    stranger.setenv("WANDB_MODE", "offline")
    assert lacking(job) is None
    stranger.delenv("WANDB_MODE")
    stranger.setenv("WANDB_API_KEY", "k" * 40)
    assert lacking(job) is None


def test_a_tracking_server_that_wants_a_password(tmp_path: Path, stranger: pytest.MonkeyPatch, guarded: str) -> None:
    pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    job = job_of("language_modeling", tmp_path, track={"mlflow": guarded})
    assert "wants a password or a token, and none is here" in str(lacking(job))
    stranger.setenv("MLFLOW_TRACKING_USERNAME", "user")
    stranger.setenv("MLFLOW_TRACKING_PASSWORD", "other")
    assert "another MLFLOW_TRACKING_PASSWORD than the one here" in str(lacking(job))
    stranger.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    assert lacking(job) is None


def test_a_tracking_server_that_is_away_holds_no_job_up(tmp_path: Path, stranger: pytest.MonkeyPatch) -> None:
    job = job_of("language_modeling", tmp_path, track={"mlflow": f"http://127.0.0.1:{free_port()}"})
    assert lacking(job) is None
    assert lacking(job_of("language_modeling", tmp_path, track={"mlflow": "mlflow.db"})) is None


def test_a_bucket_for_checkpoints_that_refuses(tmp_path: Path, stranger: pytest.MonkeyPatch, guarded: str) -> None:
    stranger.setenv("AWS_ENDPOINT_URL", guarded)
    stranger.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refused = _refusal(
        job_of("language_modeling", tmp_path), [Shared("s3://states/runs", "checkpoint.storage", "t" * 32)]
    )
    assert isinstance(refused, CapacityError)
    assert "checkpoint.storage s3://states/runs: access is refused" in str(refused)
    assert "AWS_SECRET_ACCESS_KEY" in str(refused)
    assert "ray start" in str(refused)

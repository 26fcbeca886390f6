"""Served models through real HTTP on a real cluster: the trained model and no other, and no request lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from distft.certificate import read
from tests.integration.conftest import Home
from tests.integration.servers import JOB, Clients, Server, replicas, served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(home: Home) -> Path:
    """Two runs with different weights: ``first`` and ``second``."""
    (home.folder / "served.yaml").write_text(JOB)
    home.distft("run", "served.yaml", "--name", "first")
    home.distft("run", "served.yaml", "--name", "second", "--set", "train.learning_rate=1e-2")
    return home.folder / "runs"


@pytest.fixture
def server(home: Home, runs: Path) -> Iterator[Server]:
    with served(home, "tiny=first") as made:
        yield made


@pytest.fixture
def beside_its_base(home: Home, runs: Path) -> Iterator[Server]:
    with served(home, "tiny=first", "--base") as made:
        yield made


def test_invariant_8_clients_get_what_the_training_engine_writes_until_ctrl_c(
    beside_its_base: Server, runs: Path
) -> None:
    server = beside_its_base
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "base"]
    assert server.answers_as(read(runs / "first" / "export"))

    asked: dict[str, Any] = {"model": "tiny", "prompt": "7: the people", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert client.completions.create(**{**asked, "model": "base"}).choices[0].text != whole.choices[0].text
    drawn = [client.completions.create(**{**asked, "temperature": 1, "seed": 5, "n": 2}).choices for _ in range(2)]
    assert [one.text for one in drawn[0]] == [one.text for one in drawn[1]]
    assert drawn[0][0].text != drawn[0][1].text
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(**{**asked, "prompt": "the people " * 100})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**asked, "model": "other"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()

    with client.completions.create(**{**asked, "max_tokens": 100, "stop": ["never"]}, stream=True) as stream:
        next(stream)
        server.process.send_signal(signal.SIGINT)  # requests that run finish
        rest = list(stream)
    assert rest[-1].choices[0].finish_reason in ("stop", "length")
    output, errors = server.process.communicate(timeout=150)
    assert server.process.returncode == 0, (output, errors)
    assert "prompts with equal ids" in server.said
    assert "Traceback" not in errors
    assert not list(replicas())


def test_what_cannot_be_served_is_refused_before_anything_starts(home: Home, runs: Path) -> None:
    with httpx_free_port() as taken:
        _, errors = home.distft("serve", "first", "--port", str(taken), "--address", home.address, status=2)
        assert f"cannot listen at 127.0.0.1:{taken}" in errors
    empty = runs / "empty"
    empty.mkdir()
    (empty / "job.yaml").write_text(JOB)
    _, errors = home.distft("serve", "empty", "--address", home.address, status=2)
    assert "distft export empty" in errors


@contextmanager
def httpx_free_port() -> Iterator[int]:
    """A port that somebody listens at."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.slow
def test_an_update_loses_no_request_and_a_damaged_model_takes_no_place(home: Home, server: Server, runs: Path) -> None:
    with Clients(server) as clients:
        time.sleep(2)
        output, _ = home.distft("serve", "tiny=second", "--update", "--address", home.address)
        time.sleep(2)
    print(f"{len(clients.statuses)} requests during an update, {set(clients.statuses)}")
    assert set(clients.statuses) == {200}
    assert len(clients.statuses) > 50
    assert "prompts with equal ids" in output
    second = read(runs / "second" / "export")
    assert server.answers_as(second)

    shutil.copytree(runs / "first", runs / "damaged", dirs_exist_ok=True)
    weights = runs / "damaged" / "export" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    with Clients(server) as clients:
        _, errors = home.distft("serve", "tiny=damaged", "--update", "--address", home.address, status=5)
    assert "weights" in errors
    assert set(clients.statuses) == {200}
    assert server.answers_as(second)


@pytest.mark.slow
def test_a_killed_replica_hangs_no_request(server: Server, runs: Path) -> None:
    for _ in range(3):
        (replica,) = replicas()
        with Clients(server) as clients:
            time.sleep(1)
            os.kill(replica.pid, signal.SIGKILL)
            began = time.time()
            while replica.is_running() or clients.statuses[-1] != 200 or not list(replicas()):
                assert time.time() < began + 120, clients.statuses[-5:]
                time.sleep(0.2)
            time.sleep(1)
        print(json.dumps({status: clients.statuses.count(status) for status in set(clients.statuses)}))
        assert set(clients.statuses) <= {200, 503}
    assert server.answers_as(read(runs / "first" / "export"))

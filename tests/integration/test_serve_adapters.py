"""Several adapters over one base through Ray Serve: its weights are held once, and no request is lost to an update."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import psutil
import pytest

from distft.certificate import compare, read
from distft.certificate.http import replay
from tests.integration.conftest import Home
from tests.integration.servers import JOB, Clients, Server, served

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

LORA = ("--set", "model.adapter={kind: lora, rank: 4}", "--set", "train.learning_rate=2e-2")


@pytest.fixture(scope="module")
def runs(home: Home) -> Path:
    """Three runs over one base, ``one``, ``two`` and ``three``, and ``wrong``: the first with the second's adapter."""
    (home.folder / "served.yaml").write_text(JOB)
    folder = home.folder / "runs"
    for seed, name in enumerate(("one", "two", "three")):
        home.distft("run", "served.yaml", "--name", name, *LORA, "--set", f"seed={seed}")
    shutil.copytree(folder / "one", folder / "wrong")
    other = folder / "two" / "export" / "adapter" / "adapter_model.safetensors"
    shutil.copy(other, folder / "wrong" / "export" / "adapter")
    return folder


def shared() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or []).startswith("ray::ServeReplica:distft:base+")
    ]


def answers(server: Server, name: str, folder: Path) -> bool:
    """Whether a model answers all prompts as an export's certificate says, to the log-probability."""
    certificate = read(folder)
    return not compare(certificate, replay(certificate, server.url, model=name, key=server.key))


@pytest.mark.slow
def test_adapters_share_a_replica_and_one_more_comes_without_a_lost_request(home: Home, runs: Path) -> None:
    with served(home, "tiny=one", "second=two", "--base") as server:
        (holder,) = shared()
        exports = {"tiny": runs / "one" / "export", "second": runs / "two" / "export", "base": runs / "one" / "base"}
        assert {model["id"] for model in server.http.get("/v1/models").json()["data"]} == set(exports)
        assert all(answers(server, name, folder) for name, folder in exports.items())
        assert not any(answers(server, "tiny", exports[other]) for other in ("second", "base"))

        with Clients(server) as clients:
            time.sleep(2)
            output, _ = home.distft("serve", "third=three", "--update", "--address", home.address)
            time.sleep(2)
        print(f"{len(clients.statuses)} requests while an adapter came: {set(clients.statuses)}")
        assert set(clients.statuses) == {200}
        assert "third: " in output
        assert "prompts with equal ids" in output
        exports["third"] = runs / "three" / "export"
        assert all(answers(server, name, folder) for name, folder in exports.items())
        (holder_now,) = shared()
        assert holder_now.pid != holder.pid

        with Clients(server) as clients:
            _, errors = home.distft("serve", "third=wrong", "--update", "--address", home.address, status=5)
        assert "third (" in errors
        assert "adapter: adapter/adapter_model.safetensors is another than was exported" in errors
        assert set(clients.statuses) == {200}
        assert all(answers(server, name, folder) for name, folder in exports.items())

        home.distft("run", "served.yaml", "--name", "whole")
        _, errors = home.distft("serve", "third=whole", "--update", "--address", home.address, status=2)
        assert "NEWNAME=RUN --update" in errors

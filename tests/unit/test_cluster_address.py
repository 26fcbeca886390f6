"""Which cluster ``auto`` is, without one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from distft.errors import CapacityError
from distft.orchestrate.cluster import _listens, _named, connected
from tests.support import free_port


@pytest.fixture
def last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray keeps the address of the cluster that ran here last."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_the_cluster_that_ran_here_last_is_known_by_its_file(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _named("auto") is None
    last.write_text("10.0.0.2:6379")
    assert _named("auto") == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert _named("auto") == "10.0.0.1:6379"
    assert _named("10.0.0.3:1") == "10.0.0.3:1"
    assert _named("local") is None
    assert _named("ray://10.0.0.3:10001") is None


def test_whether_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert _listens(f"127.0.0.1:{listening.getsockname()[1]}")
    assert not _listens(f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("given", [True, False], ids=["given", "auto"])
def test_a_cluster_that_has_ended_is_not_waited_for(last: Path, given: bool) -> None:
    gone = f"127.0.0.1:{free_port()}"
    last.write_text(gone)
    with (
        pytest.raises(CapacityError, match=f"nobody listens at {gone}"),
        connected(gone if given else "auto", start=False),
    ):
        pass

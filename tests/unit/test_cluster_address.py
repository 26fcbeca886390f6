"""Which cluster ``auto`` is, without one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from distft.errors import CapacityError
from distft.orchestrate.cluster import _is_gone, connected
from tests.support import free_port


@pytest.fixture
def last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray keeps the address of the cluster that ran here last."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_a_cluster_whose_head_was_killed_is_not_waited_for(last: Path) -> None:
    assert not _is_gone()
    last.write_text(f"127.0.0.1:{free_port()}")
    assert _is_gone()
    with pytest.raises(CapacityError, match="the one that ran here last has ended"), connected("auto", start=False):
        pass


def test_one_that_listens_or_is_named_is_left_to_ray(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        last.write_text(f"127.0.0.1:{listening.getsockname()[1]}")
        assert not _is_gone()
    last.write_text(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not _is_gone()

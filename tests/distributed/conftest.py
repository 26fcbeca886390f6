"""The tiny model and its prepared data, made once for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.distributed import tiny


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, corpus and prepared data."""
    folder = tmp_path_factory.mktemp("made")
    before = os.environ.get("DISTFT_CACHE")
    os.environ["DISTFT_CACHE"] = str(folder / "cache")
    try:
        tiny.make(folder)
        tiny.prepare(folder)
    finally:
        os.environ.pop("DISTFT_CACHE") if before is None else os.environ.update(DISTFT_CACHE=before)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(made, tmp_path / "home"))

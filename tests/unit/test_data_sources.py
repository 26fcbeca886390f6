"""From the data section to its files: each once, with names that do not depend on where they lie."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from distft.config import DataSection
from distft.data.prepare import sources_of
from distft.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    for name in ("a/rows.txt", "a/more.txt", "b/rows.txt", "b/deep/c.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    return tmp_path


def found(folder: Path, source: Any) -> list[tuple[str, str | None, float]]:
    sources = sources_of(DataSection.model_validate({"source": source}), folder)
    assert all(each.path.is_file() for each in sources)
    return [(each.name, each.split, each.weight) for each in sources]


def test_names_are_what_differs(folder: Path) -> None:
    assert found(folder, "data/a/rows.txt") == [("rows.txt", None, 1)]
    assert found(folder, "data/b") == [("deep/c.txt", None, 1), ("rows.txt", None, 1)]
    mixture = [{"source": "data/b/rows.txt", "weight": 2}, "data/a"]
    names = [("a/more.txt", None, 1), ("a/rows.txt", None, 1), ("b/rows.txt", None, 2)]
    assert found(folder, mixture) == names
    shutil.move(folder / "data", folder / "elsewhere")
    assert found(folder, [{"source": "elsewhere/b/rows.txt", "weight": 2}, f"{folder}/elsewhere/a/*"]) == names


def test_an_archive_is_named_as_the_folder_it_is(folder: Path) -> None:
    with zipfile.ZipFile(folder / "data" / "rows.zip", "w") as archive:
        archive.writestr("x/y.txt", "y")
    assert found(folder, "data/rows.zip") == [("y.txt", None, 1)]
    assert found(folder, ["data/a/rows.txt", "data/rows.zip"]) == [
        ("a/rows.txt", None, 1),
        ("rows.zip/x/y.txt", None, 1),
    ]


def test_three_sources(folder: Path) -> None:
    three = {"train": [{"source": "data/a", "weight": 0.5}], "validation": "data/b/rows.txt", "test": ["data/b/deep"]}
    assert found(folder, three) == [
        ("a/more.txt", "train", 0.5),
        ("a/rows.txt", "train", 0.5),
        ("b/rows.txt", "validation", 1),
        ("b/deep/c.txt", "test", 1),
    ]


def test_a_file_that_is_named_twice(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.txt: this file is named twice, by data/a and by \./data/\*/rows\.txt"):
        found(folder, ["data/a", "./data/*/rows.txt"])
    with pytest.raises(DataError, match="in the train split and in the test split"):
        found(folder, {"train": "data/a", "validation": "data/b", "test": "data/a/../a/rows.txt"})

"""Whether the local files that a job names are there."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from distft.config import Job, UnusableFiles, check
from distft.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data and models, good and bad."""
    files = {
        "data/a.txt": b"one",
        "data/b.txt": b"two",
        "rows/deep/a.jsonl.gz": b"\x1f\x8b",
        "data/empty.jsonl": b"",
        "model.gguf": b"GGUF\x03\0\0\0",
        "fake.gguf": b"<html>",
        "good/config.json": b"{}",
        "good/model.safetensors": b"\0",
        "bare/config.json": b"{}",
        "nothing/readme.md": b"#",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def lacking(folder: Path, *, model: str = "gpt2", data: str = "data/*.txt") -> list[str]:
    path = folder / "job.yaml"
    path.write_text(f"model:\n  source: {model}\ntask: {{kind: language_modeling}}\ndata:\n  source: {data}\n")
    return [str(problem).replace(f"{folder}/", "").replace(str(folder), ".") for problem in check(Job.load(path))]


def test_what_is_there_is_fine(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")  # paths are relative to the job file
    for model in ("gpt2", "owner/name", "good", "./good", "model.gguf", "pypi://p==1/x.gguf", str(folder / "good")):
        assert lacking(folder, model=model) == []
    for data in (
        "data/*.txt",
        "data/a.txt",
        "'**/*.txt'",
        "pypi://p==1/*.txt",
        f"'{folder}/data/*.txt'",
        "[data/a.txt, data/b.txt]",
        "[data/a.txt, {source: data/b.txt, weight: 0.5}]",
        "{train: rows, validation: data/a.txt, test: [data/b.txt]}",
        "rows",
        "rows/",
        "s3://bucket/rows",
    ):
        assert lacking(folder, data=data) == []


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("modl.gguf", "there is no 'modl.gguf'; in .: model.gguf"),
        ("./godo", "there is no './godo'; in .: good"),
        ("a/b/c/d", "there is no 'a/b/c/d'; in .: "),
        ("fake.gguf", "'fake.gguf' is no GGUF file; give a .gguf file, or a Hugging Face folder"),
        ("bare", "the folder 'bare' has no weights; it needs model.safetensors"),
        ("nothing", "the folder 'nothing' has no config.json; give a Hugging Face model folder"),
    ],
)
def test_a_model_that_is_not_there(folder: Path, model: str, line: str):
    (found,) = lacking(folder, model=model)
    assert found.startswith(f"job.yaml:2  model.source: {line}")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("data/*.parquet", "data.source: no file matches 'data/*.parquet'; in data: a.txt, b.txt, empty.jsonl"),
        ("data/aa.txt", "data.source: there is no 'data/aa.txt'; in data: a.txt"),
        ("[data/a.txt, dta/b.txt]", "data.source.1: there is no 'dta/b.txt'; in .: bare, data"),
        ("data", "data.source: empty.jsonl is empty"),
        ("nothing", "data.source: the folder 'nothing' holds no data files; known are .txt, .jsonl"),
        ("'n*'", "data.source: only folders match 'n*'; end the pattern with the files' names"),
        ("{train: rows, validation: data/a.txt, test: [data/c.txt]}", "data.source.test.0: there is no 'data/c.txt'"),
        ("[data/a.txt, {source: data/c.txt, weight: 2}]", "data.source.1: there is no 'data/c.txt'"),
        ("data/empty.jsonl", "data.source: empty.jsonl is empty; remove it, or name the other files"),
    ],
)
def test_data_that_is_not_there(folder: Path, data: str, line: str):
    (found,) = lacking(folder, data=data)
    assert found.startswith(f"job.yaml:5  {line}")


def test_missing_files_are_wrong_data_not_a_wrong_job(folder: Path):
    path = folder / "job.yaml"
    path.write_text("model: {source: no.gguf}\ntask: {kind: language_modeling}\ndata: {source: no.txt}\n")
    error = UnusableFiles(check(Job.load(path)))
    assert isinstance(error, DataError)
    assert error.exit_status == 3
    copied = pickle.loads(pickle.dumps(error))
    assert [problem.key for problem in copied.problems] == ["model.source", "data.source"]
    assert str(copied) == str(error)

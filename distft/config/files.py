"""Whether the local files that a job names are there: looked at from outside, nothing is read beyond a few bytes."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.addresses import FORMATS, is_data, is_path, scheme
from distft.config.problems import Finding, Problem
from distft.config.problems import Path as KeyPath

if TYPE_CHECKING:
    from distft.config.job import Job

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def check(job: Job, *, relative_only: bool = False) -> list[Problem]:
    """What the job's local files lack; empty where all is there, or nothing is local.

    Whoever refuses the job for it raises :class:`~distft.config.problems.UnusableFiles`.

    Args:
        job: The job.
        relative_only: Look at those alone that are named by relative paths: the others are on another machine.
    """
    findings: list[Finding] = []
    for part, key in ((_model, "model"), (_data, "data")):
        try:
            findings += part(job, relative_only)
        except OSError as error:
            message = f"{error.filename} cannot be read: {error.strerror}"
            findings.append(Finding((key, "source"), message, "check who may read it"))
    return [job.place(finding) for finding in findings]


def relative_files(job: Job) -> list[Path]:
    """The files that the job names by relative paths, sorted; absolute, with links as they are named.

    They belong to the job file and travel with it. What is not there is left out: :func:`check` tells it.
    """
    found: set[Path] = set()
    model = job.folder / job.model.source
    if not _is_passed_over(job.model.source, relative_only=True) and model.exists():
        inside = (path for path in model.rglob("*") if not path.name.startswith("."))
        found |= {model} if model.is_file() else {path for path in inside if path.is_file()}
    for _, _, address, _ in job.data.entries:
        if not _is_passed_over(address, relative_only=True):
            found |= set(_data_files(job.folder / address)[0])
    return sorted(Path(os.path.abspath(path)) for path in found)  # noqa: PTH100 - links stay as they are named


def _is_passed_over(address: str, relative_only: bool) -> bool:
    return bool(scheme(address)) or (relative_only and Path(address).expanduser().is_absolute())


def _model(job: Job, relative_only: bool) -> Iterator[Finding]:
    source, key = job.model.source, ("model", "source")
    if _is_passed_over(source, relative_only):
        return
    path = job.folder / Path(source).expanduser()
    if not path.exists():
        if is_path(source):
            yield _absent(path, source, key)
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                yield Finding(key, f"{source!r} is no GGUF file", "give a .gguf file, or a Hugging Face folder")
    elif not (path / "config.json").is_file():
        yield Finding(key, f"the folder {source!r} has no config.json", "give a Hugging Face model folder")
    elif not any(match for pattern in WEIGHTS for match in path.glob(pattern)):
        yield Finding(key, f"the folder {source!r} has no weights", "it needs model.safetensors")


def _data(job: Job, relative_only: bool) -> Iterator[Finding]:
    for key, _, address, _ in job.data.entries:
        if _is_passed_over(address, relative_only):
            continue
        pattern = job.folder / Path(address).expanduser()
        files, matches = _data_files(pattern)
        empty = [path for path in files if path.stat().st_size == 0]
        if matches == [pattern] and pattern.is_dir() and not files:
            yield Finding(key, f"the folder {address!r} holds no data files", f"known are {', '.join(FORMATS)}")
        elif not matches:
            yield _absent(pattern, address, key)
        elif not files:
            yield Finding(key, f"only folders match {address!r}", "end the pattern with the files' names: **/*.txt")
        elif empty:
            yield Finding(key, f"{empty[0].name} is empty", "remove it, or name the other files")


def _data_files(pattern: Path) -> tuple[list[Path], list[Path]]:
    """The data files that a path or glob means, and what it matches: of a folder itself, the data files in it."""
    matches = found = _matches(pattern)
    if matches == [pattern] and pattern.is_dir():
        found = [path for path in pattern.rglob("*") if is_data(path.relative_to(pattern).as_posix())]
    return [path for path in found if path.is_file()], matches


def _matches(pattern: Path) -> list[Path]:
    """The path itself, or what it matches as a glob (for which Path.glob takes no absolute pattern)."""
    if pattern.exists():
        return [pattern]
    return [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207


def _absent(path: Path, address: str, key: KeyPath) -> Finding:
    """Nothing is at a path; the fix names what is near it."""
    missing = f"there is no {address!r}" if not glob.has_magic(address) else f"no file matches {address!r}"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3) or names[:5]
    return Finding(key, missing, f"in {folder}: {', '.join(near) if near else 'nothing'}")

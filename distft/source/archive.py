"""Data files in a ``.zip`` archive, unpacked once into the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from filelock import FileLock

from distft.config.addresses import ARCHIVE, is_data
from distft.errors import DataError
from distft.source.matching import advice
from distft.source.splits import refuse_several
from distft.world import cache_folder


def in_archive(path: Path, name: str) -> list[tuple[Path, str]]:
    """The data files in an archive, each with its name in there, sorted by it.

    Args:
        path: The archive.
        name: How errors call it.

    Raises:
        DataError: It is damaged or encrypted, or holds no data files.
    """
    found = path.stat()
    version = hashlib.blake2b(f"{path.absolute()} {found.st_size} {found.st_mtime_ns}".encode(), digest_size=8)
    place = cache_folder() / "archives" / f"{path.stem}-{version.hexdigest()}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [member for member in archive.namelist() if not member.endswith("/")]
                members = sorted(member for member in names if is_data(member) and not member.endswith(ARCHIVE))
                refuse_several(members, name)
                for member in members:
                    unpack(archive, member, place, name)
        except (zipfile.BadZipFile, RuntimeError, EOFError) as error:  # RuntimeError: encrypted, or packed some new way
            raise DataError(
                f"the archive cannot be unpacked: {error}", where=name, fix="write or fetch it again"
            ) from None
    if not members:
        raise DataError("there are no data files in the archive", where=name, fix=advice("", names, path.name))
    return [(place / member, member) for member in members]


def unpack(archive: zipfile.ZipFile, member: str, root: Path, address: str) -> None:
    """Writes one member of an archive under ``root``, whole or not at all; what is there in full is left alone.

    Raises:
        DataError: Its name would lead out of ``root``.
    """
    target = root / member
    if ".." in Path(member).parts or not target.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the archive has a file that would leave its folder: {member!r}", where=address)
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

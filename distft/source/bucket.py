"""``s3://BUCKET/KEY`` and ``gs://BUCKET/KEY``: objects, folders and globs, fetched once into the cache.

Reached through ``pyarrow.fs``. Credentials come from where the provider's own tools take them: the AWS_* variables and
``~/.aws``; Google's application default credentials. AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names another server that
speaks S3, STORAGE_EMULATOR_HOST one that speaks Google's protocol.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from distft.config.addresses import is_data, scheme
from distft.errors import DataError, JobError
from distft.log import logger
from distft.source.matching import GLOB, advice, fixed_folder, glob_matches
from distft.source.splits import refuse_several
from distft.world import cache_folder

_AT_ONCE = 8
_PART_BYTES = 8 << 20
_SAY_SECONDS = 10.0
_PATIENCE = timedelta(seconds=15)  # Google's client tries for 15 minutes


@dataclass(frozen=True)
class _Object:
    """One object: its ``bucket/key``, its size in bytes, and what changes when it is written again."""

    name: str
    size: int
    version: str


def in_bucket(address: str) -> list[tuple[Path, str]]:
    """The files that an address names, each with its own address, sorted by it; fetched where the cache lacks them.

    Args:
        address: An object, a glob, or a folder: the data files in it.

    Raises:
        DataError: Nothing is there, or it cannot be had.
        JobError: It is no such address.
    """
    files, kind, wanted = connected(address)
    with explained(address):
        if GLOB.search(wanted) and not _is_object(files, wanted):
            listed = inside(files, fixed_folder(wanted))
            found = [each for each in listed if glob_matches(wanted, each.name)]
            if not found:
                raise DataError("nothing there matches", address, _near(files, wanted))
        elif _is_object(files, wanted):
            found = [_object(files.get_file_info(wanted))]
        else:
            listed = inside(files, wanted)
            found = [each for each in listed if is_data(each.name.removeprefix(f"{wanted}/"))]
            if not found:
                what = "the folder holds no data files" if listed else "nothing is there"
                raise DataError(what, address, _near(files, wanted))
            refuse_several([each.name.removeprefix(f"{wanted}/") for each in found], address)
        folder = cache_folder() / "remote" / kind
        targets = {each: folder / _digest([each]) / each.name.rsplit("/", 1)[-1] for each in found}
        _fetch(files, targets, address)
    return [(targets[each], f"{kind}://{each.name}") for each in sorted(found, key=lambda one: one.name)]


def folder_in_bucket(address: str, patterns: Sequence[str]) -> Path:
    """A folder's own files that match one of the patterns, as one folder in the cache; or the one object.

    Raises:
        DataError: Nothing is there, or it cannot be had.
        JobError: It is no such address.
    """
    files, kind, wanted = connected(address)
    with explained(address):
        if _is_object(files, wanted):
            found = [_object(files.get_file_info(wanted))]
        else:
            listed = [each for each in inside(files, wanted) if "/" not in each.name.removeprefix(f"{wanted}/")]
            names = {each: each.name.rsplit("/", 1)[-1] for each in listed}
            found = [each for each in listed if any(glob_matches(pattern, names[each]) for pattern in patterns)]
        if not found:
            raise DataError("nothing is there", address, _near(files, wanted))
        folder = cache_folder() / "remote" / kind / _digest(found)
        targets = {each: folder / each.name.rsplit("/", 1)[-1] for each in found}
        _fetch(files, targets, address)
    return folder if found[0].name != wanted else targets[found[0]]


def connected(address: str) -> tuple[Any, str, str]:
    """(pyarrow file system, scheme, ``bucket/key``)."""
    kind, wanted = scheme(address), address.partition("://")[2].strip("/")
    if not wanted:
        raise JobError("the address names no bucket", address, f"write {kind}://BUCKET/path")
    with explained(address):
        return (_s3(wanted.split("/")[0]) if kind == "s3" else _gs()), kind, wanted


def _s3(bucket: str) -> Any:
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"region": region, "tls_ca_file_path": os.environ.get("AWS_CA_BUNDLE")}
    if endpoint:
        server = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options |= {"endpoint_override": server.netloc, "scheme": server.scheme, "region": region or "us-east-1"}
    elif region is None:
        options["region"] = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(**options)


def _gs() -> Any:
    from pyarrow import fs

    if endpoint := os.environ.get("STORAGE_EMULATOR_HOST"):
        server = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        emulator = {"anonymous": True, "endpoint_override": server.netloc, "scheme": server.scheme}
        return fs.GcsFileSystem(**emulator, retry_time_limit=_PATIENCE)
    return fs.GcsFileSystem(retry_time_limit=_PATIENCE)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns what the file system says into what a person can do.

    Raises:
        DataError: The server refused, or cannot be reached.
    """
    try:
        yield
    except OSError as error:
        said, bucket = " ".join(str(error).split())[:200], address.partition("://")[2].split("/")[0]
        keys = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            if scheme(address) == "s3"
            else "GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login"
        )
        known = (
            (("NO_SUCH_BUCKET", "' not found"), f"there is no bucket {bucket!r}", "check its name"),
            (("ACCESS_DENIED", "403", "401", "OAuth2"), "access is refused", f"set {keys}"),
            (("INVALID_ACCESS_KEY_ID", "SIGNATURE"), "the credentials are refused", f"check {keys}"),
            (
                ("NETWORK_CONNECTION", "curl", "connect"),
                "the server cannot be reached",
                "check the endpoint and the way",
            ),
        )
        for signs, what, fix in known:
            if any(sign.lower() in said.lower() for sign in signs):
                raise DataError(f"{what} ({said})", address, fix) from error
        raise


def _is_object(files: Any, name: str) -> bool:
    from pyarrow import fs

    return bool(files.get_file_info(name).type == fs.FileType.File)


def inside(files: Any, folder: str) -> list[_Object]:
    """Every object under a folder; none where there is no such folder."""
    from pyarrow import fs

    found = files.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return [_object(info) for info in found if info.type == fs.FileType.File]


def _object(info: Any) -> _Object:
    return _Object(info.path, info.size, str(info.mtime_ns))


def _near(files: Any, wanted: str) -> str:
    """What there is in the deepest folder of ``wanted`` that exists."""
    from pyarrow import fs

    parts = (fixed_folder(wanted) + "/*" if GLOB.search(wanted) else wanted).split("/")[:-1]
    while parts:
        place = "/".join(parts)
        found = files.get_file_info(fs.FileSelector(place, allow_not_found=True))
        if found:
            return advice(wanted, [info.base_name for info in found], place)
        parts.pop()
    try:
        names = [info.base_name for info in files.get_file_info(fs.FileSelector(""))]
    except OSError:  # many may read a bucket and not list the others
        return "check the name of the bucket"
    return advice(wanted.split("/")[0], names, "the buckets of these credentials")


def _digest(objects: Iterable[_Object]) -> str:
    told = "\n".join(f"{each.name} {each.size} {each.version}" for each in objects)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def _fetch(files: Any, targets: dict[_Object, Path], address: str) -> None:
    """Fetches what the cache lacks, several at a time."""
    absent = {each: path for each, path in targets.items() if not path.is_file()}
    if not absent:
        return
    total, done, said = sum(each.size for each in absent), 0, time.monotonic()
    logger.info("fetching %d files (%.1f MB) from %s", len(absent), total / 1e6, address)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = {pool.submit(_fetch_one, files, each, path): each for each, path in absent.items()}
        for count, finished in enumerate(as_completed(running), start=1):
            try:
                finished.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            done += running[finished].size
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                logger.info("%d of %d files, %.1f of %.1f MB", count, len(absent), done / 1e6, total / 1e6)


def _fetch_one(files: Any, wanted: _Object, target: Path) -> None:
    """One object, whole or not at all; what an interrupted call has fetched of it already is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file():
            return
        with part.open("ab") as written, files.open_input_file(wanted.name) as stream:
            stream.seek(written.tell())
            while chunk := stream.read(_PART_BYTES):
                written.write(chunk)
        if (size := part.stat().st_size) != wanted.size:
            part.unlink()
            what = f"{size:,} bytes came, where {wanted.size:,} were listed"
            raise DataError(what, wanted.name, "it was changed while it was fetched: try again")
        part.replace(target)

"""Where the checkpoints of a run lie: a folder that all nodes see, or a bucket (``s3://``, ``gs://``).

Files are named by their ``/``-separated path below the run's place, the same in both.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from distft.config import Job
from distft.config.addresses import scheme
from distft.errors import CheckpointError, DataError
from distft.runs import Run
from distft.source.bucket import connected, explained, inside
from distft.world import cache_folder

_AT_ONCE = 4
_PART_BYTES = 8 << 20


class Unsound(CheckpointError):
    """What was found is not what was written, whereas any other error may be gone the next time."""


@dataclass(frozen=True)
class FileRecord:
    """A file as its writer left it.

    Attributes:
        name: Its path within its checkpoint.
        bytes: Its size.
        sha256: Of its content, hexadecimal.
    """

    name: str
    bytes: int
    sha256: str


class Storage(Protocol):
    """What saving, verifying and keeping checkpoints needs of a place; it crosses processes by pickling.

    Every method may raise OSError (a full disk is errno 28) and, where a bucket does not answer, CheckpointError.
    """

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of one file as the place has it now; None where there is none."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a small file; FileNotFoundError where there is none."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Writes a small file so that it is there whole or not at all, and survives a loss of power."""
        ...

    def write(self, name: str, content: Iterable[memoryview]) -> tuple[int, str]:
        """Writes a large file, which survives a loss of power when this returns; nothing is left of it on an error.

        Args:
            name: The file, which is not there yet.
            content: Its bytes, buffer by buffer.

        Returns:
            Its bytes and sha256.
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files in the order given; those that are not there are passed over."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where there is no such limit."""
        ...

    def local(self, folder: str, files: Sequence[FileRecord]) -> AbstractContextManager[list[Path]]:
        """Local paths of files of a checkpoint's folder; fetched and verified where they lie elsewhere."""
        ...

    def verify(self, folder: str, files: Sequence[FileRecord]) -> None:
        """Compares every file with its record.

        Raises:
            Unsound: One is missing, or differs; it is named.
        """
        ...


def storage_of(job: Job, run: Run) -> Storage:
    """Where a run keeps its checkpoints: in its own folder, or under its name in the job's storage."""
    place = job.checkpoint.storage
    if place is None:
        return Folder(run.checkpoints)
    if scheme(place):
        return Bucket(f"{place.rstrip('/')}/{run.name}")
    return Folder((job.folder / place / run.name).resolve())


@dataclass(frozen=True)
class Folder:
    """A folder that every node sees; see :class:`Storage`."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def sizes(self) -> dict[str, int]:
        """See :class:`Storage`."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):  # deleted, or renamed, meanwhile
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def size(self, name: str) -> int | None:
        """See :class:`Storage`."""
        try:
            with (self.root / name).open("rb") as file:  # network file systems ask the server anew on opening
                return os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """See :class:`Storage`."""
        return (self.root / name).read_bytes()

    def put(self, name: str, content: bytes) -> None:
        """See :class:`Storage`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        try:
            temporary.write_bytes(content)
            _flush(temporary)
            _flush(path.parent)  # what the file tells of is found before the file is
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        for folder in (path.parent, *path.parent.parents):
            _flush(folder)
            if folder == self.root.parent:
                break

    def write(self, name: str, content: Iterable[memoryview]) -> tuple[int, str]:
        """See :class:`Storage`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                written = _copied(content, file)
                file.flush()
                os.fsync(file.fileno())
            _flush(path.parent)
        except BaseException:
            self.delete([name])
            raise
        return written

    def delete(self, names: Iterable[str]) -> None:
        """See :class:`Storage`."""
        for name in names:
            path = self.root / name
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.root:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break  # not empty, or gone

    def free_bytes(self) -> int | None:
        """See :class:`Storage`."""
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    @contextmanager
    def local(self, folder: str, files: Sequence[FileRecord]) -> Iterator[list[Path]]:
        """See :class:`Storage`."""
        yield [self.root / folder / file.name for file in files]

    def verify(self, folder: str, files: Sequence[FileRecord]) -> None:
        """See :class:`Storage`."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: _compare(self.root / folder / file.name, file), files))


@dataclass(frozen=True)
class Bucket:
    """``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``, reached with the credentials that data is; see :class:`Storage`.

    What is read passes through a temporary folder in the cache, which the last process to leave empties.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.address,)  # each process connects with its own credentials

    @cached_property
    def _files(self) -> Any:
        return connected(self.address)[0]

    def _key(self, name: str = "") -> str:
        return f"{self.address.partition('://')[2]}/{name}".rstrip("/")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with explained(self.address):
                yield
        except DataError as error:
            raise CheckpointError(error.what, error.where, error.fix) from error

    def sizes(self) -> dict[str, int]:
        """See :class:`Storage`."""
        with self._explained():
            return {one.name.removeprefix(f"{self._key()}/"): one.size for one in inside(self._files, self._key())}

    def size(self, name: str) -> int | None:
        """See :class:`Storage`."""
        with self._explained():
            size: int | None = self._files.get_file_info(self._key(name)).size
            return size

    def read(self, name: str) -> bytes:
        """See :class:`Storage`."""
        with self._explained(), self._files.open_input_file(self._key(name)) as stream:
            content: bytes = stream.read()
            return content

    def put(self, name: str, content: bytes) -> None:
        """See :class:`Storage`."""
        with self._explained(), self._files.open_output_stream(self._key(name)) as stream:
            stream.write(content)

    def write(self, name: str, content: Iterable[memoryview]) -> tuple[int, str]:
        """See :class:`Storage`."""
        try:
            with self._explained(), self._files.open_output_stream(self._key(name)) as stream:
                return _copied(content, stream)
        except BaseException:
            with suppress(OSError, CheckpointError):
                self.delete([name])
            raise

    def delete(self, names: Iterable[str]) -> None:
        """See :class:`Storage`."""
        for name in names:
            with self._explained(), suppress(FileNotFoundError):
                self._files.delete_file(self._key(name))

    def free_bytes(self) -> int | None:
        """See :class:`Storage`."""
        return None

    @contextmanager
    def local(self, folder: str, files: Sequence[FileRecord]) -> Iterator[list[Path]]:
        """See :class:`Storage`."""
        with _room() as room:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                paths = list(pool.map(lambda file: self._fetch(f"{folder}/{file.name}", file, room), files))
            yield paths

    def _fetch(self, name: str, file: FileRecord, room: Path) -> Path:
        """One file, once on this machine however many ranks want it."""
        path = room / file.sha256
        with FileLock(path.with_suffix(".lock")):
            if path.is_file():
                return path
            part = path.with_suffix(".part")
            with self._explained(), part.open("wb") as written:
                try:
                    with self._files.open_input_stream(self._key(name)) as stream:
                        shutil.copyfileobj(stream, written, _PART_BYTES)
                except FileNotFoundError:
                    raise Unsound(f"damaged: {file.name} is missing") from None
            _compare(part, file)
            return part.rename(path)

    def verify(self, folder: str, files: Sequence[FileRecord]) -> None:
        """See :class:`Storage`."""
        with self.local(folder, files):
            pass


@contextmanager
def _room() -> Iterator[Path]:
    """The cache's temporary folder; the last process to leave empties it, also of what killed ones left."""
    room = cache_folder() / "checkpoints"
    room.mkdir(parents=True, exist_ok=True)
    with (room / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield room
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in room.glob("[!.]*"):
                    path.unlink(missing_ok=True)


def _copied(content: Iterable[memoryview], file: Any) -> tuple[int, str]:
    """Writes buffers to a file; their bytes and sha256, taken on the way: reading them again costs more."""
    digest, size = hashlib.sha256(), 0
    for part in content:
        for start in range(0, len(part), _PART_BYTES):
            chunk = part[start : start + _PART_BYTES]
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _compare(path: Path, file: FileRecord) -> None:
    """Raises Unsound where a file is not as it was written."""
    try:
        if (size := path.stat().st_size) != file.bytes:
            raise Unsound(f"damaged: {file.name} has {size:,} bytes instead of {file.bytes:,}")
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        raise Unsound(f"damaged: {file.name} is missing") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise Unsound(f"damaged: {file.name} cannot be read ({error})") from error
        raise
    if digest != file.sha256:
        raise Unsound(f"damaged: {file.name} has another sha256 than when it was written")


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

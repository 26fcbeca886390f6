"""Writing a checkpoint beside training, so that it is either whole or does not exist."""

from __future__ import annotations

import errno
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from distft.checkpoint import shards
from distft.checkpoint.layout import MARKER, Checkpoint, State, complete, newest_sound, step_names
from distft.checkpoint.retention import obsolete, spare
from distft.checkpoint.signature import signing_key
from distft.checkpoint.storage import FileRecord, Storage
from distft.config.values import amount
from distft.engine import Engine, Snapshot
from distft.errors import CapacityError, CheckpointError, DistftError
from distft.log import logger
from distft.runs import Run

T = TypeVar("T")

#: Seconds after which rank 0 must see what other ranks have written: network file systems look again after a while.
PATIENCE_SECONDS = 5.0
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ROOM = "free some space, lower checkpoint.budget so that fewer are kept, or set checkpoint.storage to a larger place"


@dataclass
class _Write:
    """A checkpoint that is being written.

    Attributes:
        planned: It, with the bytes of each rank's file and without their sha256.
        snapshot: What this rank writes.
        began: When, by ``time.perf_counter``.
        thread: Writes this rank's file and, on rank 0, COMPLETE.
        outcome: The checkpoint, on rank 0, or why there is none.
        seconds: How long it took until then.
    """

    planned: Checkpoint
    snapshot: Snapshot
    began: float
    thread: threading.Thread | None = None
    outcome: Checkpoint | DistftError | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Report:
    """What a rank tells of its file: its record or an error, and the machine's name."""

    record: FileRecord | None
    error: DistftError | None
    host: str


class Saver:
    """Saves an engine's state, one checkpoint at a time; every rank makes one and calls every method equally often.

    Each rank writes its state in a thread, beside the next steps, into a folder of a name that is never used again;
    what an update would change before it is written is copied into host memory. When all have, rank 0's thread looks
    for every file and writes COMPLETE: only then the checkpoint exists. Room within the budget is made before a byte is
    written.

    Args:
        engine: Whose state is saved.
        storage: Where; every rank must see the same.
        key: What COMPLETE is signed with.
        budget_bytes: What everything in the storage may take together, at any moment.

    Attributes:
        seconds: How long the last save took, from its beginning to COMPLETE.
    """

    def __init__(self, engine: Engine, storage: Storage, key: bytes, budget_bytes: int) -> None:
        self._engine = engine
        self._storage = storage
        self._key = key
        self._budget_bytes = budget_bytes
        self._write: _Write | None = None
        self._written: Snapshot | None = None  # its memory is for the next one
        self.seconds = 0.0

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._write is not None

    @property
    def written(self) -> bool:
        """Whether it is complete, or has failed, as far as this rank knows; asks no other."""
        return self._write is not None and self._write.thread is not None and not self._write.thread.is_alive()

    def save(self, state: State) -> Checkpoint:
        """:meth:`begin` and :meth:`finish`."""
        self.begin(state)
        return self.finish()

    def begin(self, state: State) -> None:
        """Makes room, and starts to write the engine's state as it is now.

        :meth:`hold` comes before the engine's next step.

        Args:
            state: How training stands.

        Raises:
            CapacityError: The budget or the disk cannot hold it; on every rank, and nothing is written.
            CheckpointError: The storage does not answer.
        """
        if self._write is not None:
            raise RuntimeError("a checkpoint is being written: finish() comes first")
        began = time.perf_counter()
        snapshot, self._written = self._engine.snapshot(into=self._written), None
        sizes = self._engine.gather(shards.file_bytes(snapshot))
        planned = _on_main(self._engine, lambda: self._plan(state, sizes))
        self._write = _Write(planned, snapshot, began)
        self._write.thread = threading.Thread(target=self._write_beside, args=(self._write,), name="checkpoint")
        self._write.thread.start()

    def hold(self) -> None:
        """Sees to it that the state may change: what is not written yet is copied."""
        if self._write is not None:
            self._write.snapshot.hold()

    def finish(self) -> Checkpoint:
        """Waits until every rank has written its part and the checkpoint is complete.

        Raises:
            CapacityError: The disk is full, or the ranks do not see the same storage; on every rank. Nothing of this
                checkpoint is left; where the disk is full, of older ones the newest sound and the best are.
            CheckpointError: It cannot be written for another reason; nothing of it is left.
        """
        write, self._write = self._write, None
        if write is None:
            raise RuntimeError("no checkpoint is being written: begin() comes first")
        if write.thread is not None:
            write.thread.join()
        self._written, self.seconds = write.snapshot, write.seconds
        outcome: Checkpoint | DistftError = self._engine.broadcast(write.outcome)
        if isinstance(outcome, Checkpoint):
            return outcome
        with suppress(OSError, CheckpointError):  # rank 0 cannot where the storage is not shared
            self._storage.delete([self._file(write.planned)])
        raise outcome

    def _file(self, checkpoint: Checkpoint) -> str:
        return f"{checkpoint.name}/{checkpoint.files[self._engine.world.rank].name}"

    def _write_beside(self, write: _Write) -> None:
        """The thread: writes this rank's file, and on rank 0 COMPLETE when all have written theirs."""
        rank = self._engine.world.rank
        try:
            reports = self._engine.gather_aside(self._write_shard(write))
            if self._engine.world.is_main:
                write.outcome = self._commit(write.planned, reports)
        except DistftError as error:
            write.outcome = error
        except Exception as error:
            logger.exception("rank %d cannot make a checkpoint complete", rank)
            write.outcome = CheckpointError(f"cannot be completed: {error!r}", where=f"rank {rank}")
        write.seconds = time.perf_counter() - write.began

    def _write_shard(self, write: _Write) -> _Report:
        """Writes this rank's file."""
        rank, host = self._engine.world.rank, socket.gethostname()
        try:
            size, digest = self._storage.write(self._file(write.planned), shards.content(write.snapshot))
            return _Report(FileRecord(write.planned.files[rank].name, size, digest), None, host)
        except DistftError as error:
            return _Report(None, error, host)
        except OSError as error:
            return _Report(None, _explained(error, f"rank {rank}, {self._storage}"), host)
        except Exception as error:
            logger.exception("rank %d cannot write its part of a checkpoint", rank)
            return _Report(None, CheckpointError(f"cannot be written: {error!r}", where=f"rank {rank}"), host)

    def _plan(self, state: State, sizes: Sequence[int]) -> Checkpoint:
        """Decides, on rank 0, which files there will be, and makes room for them."""
        folder = f"w{len(sizes)}-{secrets.token_hex(8)}"
        files = (FileRecord(f"{folder}/rank-{rank:05d}.safetensors", size, "0" * 64) for rank, size in enumerate(sizes))
        planned = Checkpoint(self._storage, state, tuple(files))
        make_room(self._storage, self._key, self._budget_bytes, planned.bytes)
        return planned

    def _commit(self, planned: Checkpoint, reports: Sequence[_Report]) -> Checkpoint:
        """Writes COMPLETE, on rank 0, if every file is there; otherwise removes them all."""
        try:
            for report in reports:
                if report.error is not None:
                    raise report.error
            checkpoint = replace(planned, files=tuple(report.record for report in reports if report.record))
            _look_for_files(checkpoint, [report.host for report in reports])
            self._storage.put(f"{checkpoint.name}/{MARKER}", checkpoint.content(self._key))
        except (OSError, DistftError) as raised:
            error = _explained(raised, str(self._storage)) if isinstance(raised, OSError) else raised
            with suppress(OSError, CheckpointError):
                self._clear(planned)
            raise error from raised
        return checkpoint

    def _clear(self, planned: Checkpoint) -> None:
        """Removes, on rank 0, what there is of a checkpoint; where the disk is full, older ones that can go too."""
        self._storage.delete(planned.names[1:])
        free = self._storage.free_bytes()
        if free is not None and free < planned.bytes:
            keep_least(self._storage, self._key)


def shared_key(engine: Engine, run: Run, storage: Storage) -> bytes:
    """:func:`~distft.checkpoint.signing_key` on every rank; it, or its error, is the same on all."""
    return _on_main(engine, lambda: signing_key(run, storage))


def make_room(storage: Storage, key: bytes, budget_bytes: int, incoming_bytes: int) -> None:
    """Removes what is part of no checkpoint, then as many of the oldest ones as another one needs gone.

    Raises:
        CapacityError: Beside the newest and the best it fits neither the budget nor the disk.
    """
    sizes = storage.sizes()
    checkpoints = complete(storage, key, sizes)
    kept = {name for checkpoint in checkpoints for name in checkpoint.names}
    steps = set(step_names(sizes))
    leftovers = {name for name in sizes if name.split("/")[0] in steps and name not in kept}
    storage.delete(leftovers)
    foreign_bytes = sum(size for name, size in sizes.items() if name not in leftovers | kept)
    going = obsolete(checkpoints, budget_bytes - foreign_bytes, incoming_bytes)
    _delete(going)
    _make_free(storage, [checkpoint for checkpoint in checkpoints if checkpoint not in going], incoming_bytes)


def _make_free(storage: Storage, checkpoints: Sequence[Checkpoint], incoming_bytes: int) -> None:
    """Removes checkpoints, oldest first, while the disk is too full for another."""
    free = storage.free_bytes()
    if free is None or free >= incoming_bytes:
        return
    going = spare(checkpoints)
    if free + sum(checkpoint.bytes for checkpoint in going) < incoming_bytes:
        raise CapacityError(
            f"the disk has {amount(free)} free, and a checkpoint takes {amount(incoming_bytes)} beside the newest "
            "and the best",
            where=str(storage),
            fix=ROOM,
        )
    for checkpoint in going:
        _delete([checkpoint])
        if (storage.free_bytes() or 0) >= incoming_bytes:
            return


def keep_least(storage: Storage, key: bytes) -> None:
    """Deletes every checkpoint but the newest sound one, and the best as that one knows it."""
    newest, _ = newest_sound(storage, key)
    if newest is not None:
        kept = {newest.step, newest.state.best_step}
        _delete([checkpoint for checkpoint in complete(storage, key) if checkpoint.step not in kept])


def _delete(checkpoints: Sequence[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        checkpoint.storage.delete(checkpoint.names)


def _look_for_files(checkpoint: Checkpoint, hosts: Sequence[str]) -> None:
    """Makes sure, on rank 0, that every rank's file is where rank 0 looks.

    Raises:
        CapacityError: One is not there, or not of the size that it was written with.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    for rank, (file, host) in enumerate(zip(checkpoint.files, hosts, strict=True)):
        while checkpoint.storage.size(f"{checkpoint.name}/{file.name}") != file.bytes:
            if time.monotonic() > end:
                raise CapacityError(
                    f"rank 0 on {hosts[0]} does not see the file that rank {rank} on {host} has written: "
                    "the storage is not shared by the nodes",
                    where=f"{checkpoint.place}/{file.name}",
                    fix="set checkpoint.storage to a folder that all nodes see, or to s3:// or gs://",
                )
            time.sleep(0.1)


def _on_main(engine: Engine, work: Callable[[], T]) -> T:
    """Does something on rank 0 alone; its value is returned, or its error raised, on every rank."""
    outcome: tuple[T | None, DistftError | None] = (None, None)
    if engine.world.is_main:
        try:
            outcome = work(), None
        except DistftError as error:
            outcome = None, error
        except OSError as error:
            outcome = None, _explained(error, "rank 0")
    value, failure = engine.broadcast(outcome)
    if failure is not None:
        raise failure
    result: T = value
    return result


def _explained(error: OSError, where: str) -> DistftError:
    if error.errno in FULL:
        return CapacityError(
            f"the disk is full ({error.strerror}): the checkpoint was not written, and the newest before it is kept",
            where=where,
            fix=ROOM,
        )
    return CheckpointError(f"cannot be written: {error}", where=where)

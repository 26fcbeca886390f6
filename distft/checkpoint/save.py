"""Writing a checkpoint so that it is either whole or does not exist."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distft.checkpoint.layout import MARKER, Checkpoint, FileRecord, State, complete, step_folder, step_folders
from distft.checkpoint.retention import obsolete
from distft.engine import Engine
from distft.errors import CapacityError, CheckpointError, DistftError
from distft.runs import write_json

T = TypeVar("T")


def save(engine: Engine, root: Path, state: State, budget_bytes: int) -> Checkpoint:
    """Writes the checkpoint of a step; every rank calls it, and all return or all raise.

    Each rank writes its shards, flushes them to disk and hashes them; only when all have, rank 0 writes COMPLETE.
    Older checkpoints make room before.

    Args:
        engine: Whose state is written.
        root: The folder of checkpoints, which every rank sees.
        state: How training stands.
        budget_bytes: What all checkpoints may take together.

    Raises:
        CapacityError: The budget or the disk cannot hold it; nothing of it is left.
        CheckpointError: It cannot be written for another reason.
    """
    folder = step_folder(root, state.step)
    _on_main(engine, lambda: _make_room(root, folder, budget_bytes, engine.state_bytes()))
    error: OSError | None = None
    records: list[FileRecord] = []
    try:
        records = [_flushed(path, folder) for path in engine.save(folder)]
    except OSError as raised:
        error = raised
    written = engine.gather((records, error))
    files = tuple(record for records, _ in written for record in records)
    errors = {rank: error for rank, (_, error) in enumerate(written) if error is not None}

    def commit() -> Checkpoint:
        checkpoint = Checkpoint(folder, state, files)
        try:
            _raise_first(errors, folder)
            _delete(obsolete(_others(root, folder), budget_bytes, checkpoint.bytes))
            _write_marker(checkpoint)
        except (OSError, DistftError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return checkpoint

    return _on_main(engine, commit)


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


def _make_room(root: Path, folder: Path, budget_bytes: int, estimated_bytes: int) -> None:
    """Removes what no checkpoint is, then what the next one needs gone, and makes its folder."""
    for path in step_folders(root):
        if path == folder or not (path / MARKER).is_file():
            shutil.rmtree(path)
    others = _others(root, folder)
    needed = others[0].bytes if others else estimated_bytes
    _delete(obsolete(others, budget_bytes, needed))
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        folder.rmdir()
        raise CapacityError(
            f"the disk has {free:,} bytes free and the checkpoint takes about {needed:,}",
            where=str(root),
            fix="free some space, or lower checkpoint.budget so that fewer are kept; then --resume",
        )


def _others(root: Path, folder: Path) -> list[Checkpoint]:
    return [checkpoint for checkpoint in complete(root) if checkpoint.folder != folder]


def _delete(checkpoints: list[Checkpoint]) -> None:
    """Deletes checkpoints, COMPLETE first, so that one half deleted is none."""
    for checkpoint in checkpoints:
        (checkpoint.folder / MARKER).unlink()
        shutil.rmtree(checkpoint.folder)


def _flushed(path: Path, folder: Path) -> FileRecord:
    _flush(path)
    return FileRecord.of(path, folder)


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_marker(checkpoint: Checkpoint) -> None:
    for folder in {(checkpoint.folder / record.name).parent for record in checkpoint.files}:
        _flush(folder)
    temporary = checkpoint.folder / f".{MARKER}"
    write_json(temporary, checkpoint.document())
    _flush(temporary)
    temporary.rename(checkpoint.folder / MARKER)
    _flush(checkpoint.folder)
    _flush(checkpoint.folder.parent)


def _raise_first(errors: dict[int, OSError], folder: Path) -> None:
    for rank, error in errors.items():
        raise _explained(error, f"rank {rank}, {folder}")


def _explained(error: OSError, where: str) -> DistftError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(
            "the disk is full: the checkpoint was not written, the ones before it are kept",
            where=where,
            fix="free some space, or lower checkpoint.budget so that fewer are kept; then --resume",
        )
    return CheckpointError(f"cannot be written: {error}", where=where)

"""One unit of work: read, tokenised, fingerprinted, and written to two files named by the unit.

A unit may be done in any process; nothing of what it writes depends on which.
"""

from __future__ import annotations

import errno
import hashlib
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distft.data import documents, duplicates, store
from distft.data.documents import Columns, Record, Unit
from distft.data.example import EMPTY, FATES, Example, Task
from distft.errors import CapacityError, DataError, DistftError

_BATCH_LETTERS = 1 << 18
_BATCH_ROWS = 512
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Report:
    """What a unit of work came to.

    Attributes:
        unit: Its number.
        rows: Rows read.
        lengths: Lines or rows of each of its pieces, which the numbers of the next piece start at.
        error: Why it failed, as a value: exceptions change their class on the way through other systems.
    """

    unit: int
    rows: int = 0
    lengths: tuple[int, ...] = ()
    error: DistftError | None = None


@contextmanager
def disk_full_explained(folder: Path) -> Iterator[None]:
    """Turns "no space left on device" into an error with figures.

    Raises:
        CapacityError: The disk that holds ``folder`` is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        raise CapacityError(
            f"the disk is full while preparing data: {usage.free / 1e9:.2f} GB of {usage.total / 1e9:.1f} GB are free",
            where=str(folder),
            fix="free some space, or set DISTFT_CACHE to a folder on a larger disk; prepared data takes about "
            "as much as the text",
        ) from error


def work(number: int, unit: Unit, columns: Columns, task: Task, folder: Path) -> Report:
    """Reads, tokenises and fingerprints one unit; writes its token file and its index into ``folder``."""
    try:
        with disk_full_explained(folder):
            return _work(number, unit, columns, task, folder)
    except DistftError as error:
        return Report(number, error=error)
    except (FileNotFoundError, PermissionError) as error:
        fix = "every node must see the data's files, and DISTFT_CACHE, under the same paths"
        return Report(number, error=DataError(f"cannot be opened on {platform.node()}", str(error.filename), fix))


def _work(number: int, unit: Unit, columns: Columns, task: Task, folder: Path) -> Report:
    index = _Index()
    records = ((place, record) for place, piece in enumerate(unit) for record in documents.read(piece, columns))
    for batch in _batches(records):
        index.add(batch, task)
    tokens: dict[str, pa.Array] = {"ids": pa.array(_joined(index.ids, np.int32))}
    if any(mask is not None for mask in index.masks):
        masks = [
            np.ones(len(ids), np.uint8) if mask is None else mask.astype(np.uint8)
            for ids, mask in zip(index.ids, index.masks, strict=True)
        ]
        tokens["supervised"] = pa.array(_joined(masks, np.uint8))
    store.write_arrow(folder / f"tokens-{number:05d}.arrow", tokens)
    store.write_arrow(folder / f"index-{number:05d}.arrow", index.columns())
    return Report(number, len(index.rows), tuple(documents.length(piece) for piece in unit))


def _joined(arrays: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def _batches(records: Iterator[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    """Records, each with its piece's place: enough for the tokenizer to be quick, few enough to be small."""
    batch: list[tuple[int, Record]] = []
    letters = 0
    for piece, record in records:
        batch.append((piece, record))
        letters += sum(len(text or "") for text in record.text)
        if letters >= _BATCH_LETTERS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


class _Index:
    """What is known of each row of a unit, gathered column by column."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.ids: list[NDArray[np.int32]] = []
        self.masks: list[NDArray[np.bool_] | None] = []
        self._offset = 0

    def add(self, records: Sequence[tuple[int, Record]], task: Task) -> None:
        full = [record for _, record in records if not record.is_empty]
        examples = iter(task.encode([tuple(text or "" for text in record.text) for record in full]))
        signatures = iter(duplicates.signatures([_content(record) for record in full]))
        for piece, record in records:
            if record.is_empty:
                self._add(piece, record, None, b"\0" * (4 * duplicates.SIGNATURE_WORDS))
            else:
                self._add(piece, record, next(examples), next(signatures).tobytes())

    def _add(self, piece: int, record: Record, example: Example | None, signature: bytes) -> None:
        text = _content(record)
        digest = _digest(text)
        unit = digest if record.group is None else _digest(b"group " + record.group.encode())
        place = (piece, record.row, digest, unit, record.stratum or "")
        if example is None:
            self.rows.append((*place, FATES.index(EMPTY), len(text), 0, 0, 0, digest, signature, [], []))
            return
        content = example.ids.tobytes()
        if example.supervised is not None:
            content += example.supervised.tobytes()
        self.rows.append(
            (
                *place,
                FATES.index(example.fate),
                len(text),
                example.scored_bytes,
                len(example.ids),
                self._offset,
                _digest(content),
                signature,
                [start for start, _ in example.spans],
                [length for _, length in example.spans],
            )
        )
        self.ids.append(example.ids)
        self.masks.append(example.supervised)
        self._offset += len(example.ids)

    def columns(self) -> dict[str, pa.Array]:
        values = list(zip(*self.rows, strict=True)) or [()] * len(_INDEX)
        return {name: pa.array(column, type_) for (name, type_), column in zip(_INDEX.items(), values, strict=True)}


_INDEX = {
    "piece": pa.int32(),
    "row": pa.int64(),
    "digest": pa.binary(_DIGEST_BYTES),
    "unit": pa.binary(_DIGEST_BYTES),
    "stratum": pa.string(),
    "fate": pa.int8(),
    "text_bytes": pa.int64(),
    "scored_bytes": pa.int64(),
    "tokens": pa.int64(),
    "offset": pa.int64(),
    "content": pa.binary(_DIGEST_BYTES),
    "signature": pa.binary(4 * duplicates.SIGNATURE_WORDS),
    "start": pa.list_(pa.int64()),
    "length": pa.list_(pa.int64()),
}


def _content(record: Record) -> bytes:
    return "\0".join(value or "" for value in record.text).encode()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()

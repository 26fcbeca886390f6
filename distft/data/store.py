"""Prepared data on disk: Arrow files that every worker maps, so that rows cost no memory and no copy.

::

    card.json               what became of the source (:mod:`distft.data.card`)
    documents.arrow         every row of the source: where from, split, fate, copies, bytes, tokens, label, ids' place
    tokens-00000-00000.arrow ...  the ids of the documents of one part of a unit of work, end to end
    rows-SPLIT.arrow        rows as (document, start, length) of each of their segments
    manifest.json           bytes and sha256 of all these; written last

Legend: T tokens of a row.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distft.data.splits import SPLITS
from distft.errors import DataError
from distft.runs import read_json, write_json

CARD, DOCUMENTS, MANIFEST = "card.json", "documents.arrow", "manifest.json"
SAMPLED_ROWS = 256  # that the mean attended length is taken over
PARTIAL = ".partial"  # how the name of a file ends while it is written


@dataclass(frozen=True)
class Row:
    """One row: segments of one or more documents, end to end, without padding.

    Attributes:
        index: Its number in the split.
        input_ids: int32 (T,), a view of the mapped file where the row is one segment without a label. Where the
            document has a label, the last id of its segment is the label's number.
        supervised: bool (T,), whether a token is a target; never the first of a segment.
        segments: Tokens of each segment.
        documents: The document each segment is of.
    """

    index: int
    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    segments: tuple[int, ...]
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """A document that rows are made of.

    Attributes:
        index: Its number, as in ``Row.documents``.
        source: The file's name.
        row: 1-based line or row in the file.
        scored_bytes: UTF-8 bytes of text that its supervised tokens stand for.
        tokens: Its tokens before anything was cut.
    """

    index: int
    source: str
    row: int
    scored_bytes: int
    tokens: int


@dataclass(frozen=True)
class Rows:
    """The rows of one split, mapped from disk.

    Attributes:
        ids: uint64 (rows,), a hash of each row's content.
    """

    ids: NDArray[np.uint64]
    _tokens: NDArray[np.int32] = field(repr=False)
    _supervised: NDArray[np.int32] = field(repr=False)
    _offsets: NDArray[np.int32] = field(repr=False)
    _segments: tuple[NDArray[np.int32], ...] = field(repr=False)  # document, start and length of each segment
    _store: _Tokens = field(repr=False)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        """The row ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = slice(self._offsets[index], self._offsets[index + 1])
        segments = list(zip(*(column[place].tolist() for column in self._segments), strict=True))
        ids = [self._store.ids(*segment) for segment in segments]
        supervised = [self._store.supervised(*segment) for segment in segments]
        return Row(
            int(index),
            ids[0] if len(ids) == 1 else np.concatenate(ids),
            np.concatenate(supervised),
            tuple(length for _, _, length in segments),
            tuple(document for document, _, _ in segments),
        )

    def __iter__(self) -> Iterator[Row]:
        """Every row, in order."""
        return (self[index] for index in range(len(self)))

    def tokens(self, indices: NDArray[np.int64]) -> int:
        """Tokens of these rows, without padding."""
        return int(self._tokens[indices].sum(dtype=np.int64))

    def supervised_tokens(self, indices: NDArray[np.int64]) -> int:
        """Targets in these rows."""
        return int(self._supervised[indices].sum(dtype=np.int64))

    def attended_tokens(self) -> int:
        """The mean length of the segment that a token lies in, over the first rows: what its attention costs by."""
        lengths = self._segments[2][: self._offsets[min(len(self), SAMPLED_ROWS)]].astype(np.int64)
        return round(float((lengths**2).sum() / lengths.sum()))


@dataclass(frozen=True)
class _Tokens:
    """The ids of all documents, wherever they lie."""

    parts: tuple[NDArray[np.int32], ...]
    masks: tuple[NDArray[np.uint8] | None, ...]
    part: NDArray[np.int32]
    offset: NDArray[np.int64]
    label: NDArray[np.int32]

    def ids(self, document: int, start: int, length: int) -> NDArray[np.int32]:
        first = int(self.offset[document]) + start
        part: NDArray[np.int32] = self.parts[self.part[document]]
        label = self.label[document]
        return part[first : first + length] if label < 0 else np.append(part[first : first + length - 1], label)

    def supervised(self, document: int, start: int, length: int) -> NDArray[np.bool_]:
        mask = self.masks[self.part[document]]
        first = int(self.offset[document]) + start
        result: NDArray[np.bool_] = (
            np.ones(length, dtype=bool) if mask is None else mask[first : first + length].astype(bool)
        )
        result[0] = False
        return result


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: Where it lies.
        card: The data card, plain values.
    """

    folder: Path
    card: dict[str, Any]
    _documents: pa.RecordBatch = field(repr=False)
    _store: _Tokens = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Maps the files; reads none of the tokens.

        Raises:
            DataError: A file is missing or has another size than when it was written.
        """
        problem = fault(folder, deep=False)
        if problem:
            raise DataError(
                f"the prepared data is damaged: {problem}",
                where=str(folder),
                fix="prepare it again: distft prepare JOB.yaml",
            )
        documents = map_arrow(folder / DOCUMENTS)
        parts = [map_arrow(path) for path in sorted(folder.glob("tokens-*.arrow"))]
        tokens = _Tokens(
            tuple(_numbers(part["ids"]) for part in parts),
            tuple(_numbers(part["supervised"]) if "supervised" in part.schema.names else None for part in parts),
            _numbers(documents["part"]),
            _numbers(documents["offset"]),
            _numbers(documents["label"]),
        )
        return cls(folder, read_json(folder / CARD), documents, tokens)

    @property
    def fingerprint(self) -> str:
        """A hash of what training sees: the ordered content of the rows of every split."""
        return str(self.card["fingerprint"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their numbers; empty where the task has none."""
        return tuple(self.card["labels"]["names"])

    def rows(self, split: str) -> Rows:
        """The rows of "train", "validation" or "test"; none where the job asks for no such split."""
        batch = map_arrow(self.folder / f"rows-{split}.arrow")
        document = batch["document"]
        segments = (document.values, *(batch[name].values for name in ("start", "length")))
        return Rows(
            _numbers(batch["id"]),
            _numbers(batch["tokens"]),
            _numbers(batch["supervised"]),
            _numbers(document.offsets),
            tuple(map(_numbers, segments)),
            self._store,
        )

    def document(self, number: int) -> Document:
        """The document of a number, as in ``Row.documents``."""
        return Document(number, *(self._documents[name][number].as_py() for name in _DOCUMENT_COLUMNS))

    def documents(self, split: str) -> list[Document]:
        """The documents that the rows of a split are made of, by number."""
        table = self._documents
        numbers = np.flatnonzero((_numbers(table["copies"]) > 0) & (_numbers(table["split"]) == SPLITS.index(split)))
        columns = [table[name].take(pa.array(numbers)).to_pylist() for name in _DOCUMENT_COLUMNS]
        return [Document(*values) for values in zip(numbers.tolist(), *columns, strict=True)]


_DOCUMENT_COLUMNS = ("source", "row", "scored_bytes", "tokens")


def write_arrow(path: Path, columns: dict[str, pa.Array]) -> None:
    """Writes the columns as one record batch of an Arrow IPC file, whole or not at all; equal values, equal bytes."""
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}{PARTIAL}")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)


def map_arrow(path: Path) -> pa.RecordBatch:
    """The record batch of a file, mapped; its numbers are views of the file."""
    return pa.ipc.open_file(pa.memory_map(str(path), "r")).get_batch(0)


def _numbers(column: pa.Array) -> NDArray[Any]:
    """A view of a column of numbers, of which none is missing; ``to_numpy`` imports pandas, 37 MB of each rank."""
    values = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
    return values[column.offset : column.offset + len(column)]


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """Hex digests of the files' bytes, several files at a time (hashing leaves the interpreter free).

    Raises:
        DataError: A file cannot be read.
    """

    def digest(path: Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError("cannot be read", str(path), f"the system says: {error.strerror}") from error

    with ThreadPoolExecutor() as threads:
        return list(threads.map(digest, paths))


def seal(folder: Path) -> None:
    """Writes the manifest: from now on the folder is whole."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    digests = sha256_of(paths)
    write_json(
        folder / MANIFEST,
        {
            path.name: {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        },
    )


def fault(folder: Path, *, deep: bool) -> str | None:
    """What is wrong with a prepared folder, or None.

    Args:
        folder: The folder.
        deep: Read every byte and compare digests; otherwise compare sizes only.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        wanted = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or broken"
    for path, (size, _) in wanted.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, not {size}"
    if deep:
        for path, digest in zip(wanted, sha256_of(list(wanted)), strict=True):
            if digest != wanted[path][1]:
                return f"{path.name} was changed"
    return None

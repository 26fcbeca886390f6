"""Files of typed columns: parquet, and Arrow's IPC file and stream, which ``datasets.save_to_disk`` writes.

A parquet file is cut into its row groups, an arrow file into runs of its record batches. Columns that ``datasets`` has
marked as classes (``ClassLabel``) hold numbers; rows get the classes' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distft.data.piece import Piece
from distft.errors import DataError

_ROWS = 1024
_ARROW_FILE = b"ARROW1"
_FEATURES = b"huggingface"
_SHOWN = 8


def cut(number: int, path: Path, name: str, format_: str, unit_bytes: int) -> Iterator[Piece]:
    """The file as pieces of about ``unit_bytes``.

    Raises:
        DataError: It is damaged, or holds no rows.
    """
    size, whole = path.stat().st_size, Piece(number, path, name, format_, 0, 1, 0)
    if format_ == "parquet":
        metadata = _parquet(whole).metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    else:
        rows = [batch.num_rows for batch in _batches(whole, None)]
    total = sum(rows)
    if total == 0:
        raise DataError("the file holds no rows", where=name, fix="leave it out of data.source")
    start = taken = 0
    for place, count in enumerate(rows, start=1):
        taken += count
        if format_ == "parquet" or place == len(rows) or size * taken // total >= unit_bytes:
            yield Piece(number, path, name, format_, start, place, size * taken // total)
            start, taken = place, 0


def columns(piece: Piece) -> tuple[str, ...]:
    """The columns of the file."""
    return tuple(_schema(piece).names)


def _schema(piece: Piece) -> Any:
    if piece.format == "parquet":
        return _parquet(piece).schema_arrow
    with _reader(piece) as reader:
        return reader.schema


def classes(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of each column that ``datasets`` has marked as one of classes.

    It writes its features as JSON into the schema's metadata (``datasets.Features.arrow_schema``).
    """
    try:
        features = json.loads((schema.metadata or {})[_FEATURES])["info"]["features"]
        marked = {name: one for name, one in features.items() if isinstance(one, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # no features, or those of another version
    return {
        name: [str(label) for label in one["names"]]
        for name, one in marked.items()
        if one.get("_type") == "ClassLabel" and isinstance(one.get("names"), list)
    }


def rows(piece: Piece, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based row of the piece, values of the wanted columns that there are).

    Raises:
        DataError: The file is damaged, or a class has a number without a name.
    """
    schema = _schema(piece)
    names = [name for name in schema.names if name in wanted]
    labels = {name: labels for name, labels in classes(schema).items() if name in names}
    number = 0
    for batch in _parquet_batches(piece, names) if piece.format == "parquet" else _batches(piece, piece.stop):
        for start in range(0, batch.num_rows, _ROWS):
            for values in batch.select(names).slice(start, _ROWS).to_pylist():
                number += 1
                for name, known in labels.items():
                    values[name] = _named(values[name], name, known, piece, number)
                yield number, values


def _named(value: Any, column: str, labels: list[str], piece: Piece, number: int) -> Any:
    """The name of a class; None for -1, by which data sets say that a row has none."""
    if not isinstance(value, int) or value == -1:
        return None if value == -1 else value
    if not 0 <= value < len(labels):
        raise DataError(
            f"column {column!r} holds {value}, and the file names {len(labels)} classes: {', '.join(labels[:_SHOWN])}",
            where=where(piece, number),
            fix="write the file again with datasets, or take the features out of its schema's metadata",
        )
    return labels[value]


def length(piece: Piece) -> int:
    """Rows of the piece, whatever its limit."""
    if piece.format == "parquet":
        metadata = _parquet(piece).metadata
        return sum(metadata.row_group(group).num_rows for group in range(piece.start, piece.stop))
    return sum(batch.num_rows for batch in _batches(piece, piece.stop))


def where(piece: Piece, number: int) -> str:
    """Where a row is, counted from the start of its file."""
    before = length(Piece(piece.source, piece.path, piece.name, piece.format, 0, piece.start, 0))
    return f"{piece.name}, row {before + number}"


def _parquet(piece: Piece) -> Any:
    try:
        return pq.ParquetFile(piece.path, memory_map=True)
    except pa.ArrowException as error:
        raise DataError(
            f"not a whole parquet file: {error}", where=piece.name, fix="it may be cut short; write or fetch it again"
        ) from error


def _parquet_batches(piece: Piece, names: list[str]) -> Iterator[Any]:
    groups = list(range(piece.start, piece.stop))
    try:
        yield from _parquet(piece).iter_batches(_ROWS, row_groups=groups, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"row group {piece.start} cannot be read: {error}",
            where=piece.name,
            fix="write or fetch the file again",
        ) from error


@contextmanager
def _reader(piece: Piece) -> Iterator[Any]:
    """A reader of an Arrow IPC file or stream; its batches lie in the file until they are looked at."""
    with pa.memory_map(str(piece.path)) as file:
        try:
            is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
            file.seek(0)
            yield pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"not a whole arrow file: {error}",
                where=piece.name,
                fix="it may be cut short; write or fetch it again",
            ) from error


def _batches(piece: Piece, stop: int | None) -> Iterator[Any]:
    with _reader(piece) as reader:
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            for place in range(piece.start, reader.num_record_batches if stop is None else stop):
                yield reader.get_batch(place)
        else:
            yield from islice(reader, piece.start, stop)

"""Reading documents: txt, jsonl and parquet files as streams of records, cut into units of work.

The units depend on the files alone, never on how many processes there are, so that what is prepared from them does
not either. A big jsonl or lines file is cut into byte ranges (a line belongs to the range it begins in), a parquet
file into row groups, and small files are taken together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distft.errors import DataError

UNIT_BYTES = 1 << 20  # smallest unit of work worth a task of its own
UNITS = 1024  # about how many units a big source is cut into
_BOM = b"\xef\xbb\xbf"
_SCAN_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """One file of the data source.

    Attributes:
        path: Where it is.
        name: How reports call it; does not depend on where the source lies.
        split: The split it was given for, or None where the splits are drawn.
    """

    path: Path
    name: str
    split: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns to read: ``text`` must hold text, ``group`` and ``stratum`` any plain value."""

    text: tuple[str, ...]
    group: str | None = None
    stratum: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every column named, each once."""
        named = (*self.text, self.group, self.stratum)
        return tuple(dict.fromkeys(column for column in named if column is not None))


@dataclass(frozen=True)
class Piece:
    """A part of one file.

    Attributes:
        source: The file's number in the list of sources.
        path: Where it is.
        format: "txt" (the file is one document), "lines", "jsonl" or "parquet".
        start: First byte (lines, jsonl) or row group (parquet).
        stop: The byte or row group after the last.
        size_bytes: About how much work it is.
        limit: Rows to read at most.
    """

    source: int
    path: Path
    format: str
    start: int
    stop: int
    size_bytes: int
    limit: int | None = None


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class Record:
    """One row of a source.

    Attributes:
        row: 1-based line (lines, jsonl) or row of its piece; 1 in a txt file.
        text: The text columns' values; None where there is none.
        group: The group's value as text, where one is asked for.
        stratum: The stratum's value as text, where one is asked for.
    """

    row: int
    text: tuple[str | None, ...]
    group: str | None = None
    stratum: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether any of its texts is null or blank, so that no example can be made of it."""
        return any(value is None or not value.strip() for value in self.text)


def plan_units(sources: Sequence[Source], lines: bool, limit: int | None = None) -> list[Unit]:
    """The source as units of work, in source order.

    Args:
        sources: The files, in order.
        lines: Whether each line of a txt file is a document.
        limit: Keep the first rows only; of each split, where splits are given.

    Raises:
        DataError: A file is missing, empty, of an unknown format, or not the parquet file it should be.
    """
    total_bytes = sum(_size(source) for source in sources)
    unit_bytes = max(UNIT_BYTES, total_bytes // UNITS)
    units: list[list[Piece]] = []
    room, left = 0, limit
    for number, source in enumerate(sources):
        if number and source.split != sources[number - 1].split:
            left = limit
        for piece in _pieces(number, source, lines, unit_bytes):
            if left is not None:
                if left <= 0:
                    break
                piece, rows = _limited(piece, left)
                left -= rows
            if room < piece.size_bytes:
                units.append([])
                room = unit_bytes
            units[-1].append(piece)
            room -= piece.size_bytes
    return [tuple(unit) for unit in units]


def _size(source: Source) -> int:
    try:
        size = source.path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=source.name, fix="see data.source") from error
    if size == 0:
        raise DataError("the file is empty", where=source.name, fix="remove it, or leave it out of data.source")
    return size


def _pieces(number: int, source: Source, lines: bool, unit_bytes: int) -> Iterator[Piece]:
    format_ = _FORMATS.get(source.path.suffix.lower())
    if format_ is None:
        raise DataError(
            f"files of type {source.path.suffix or '(no suffix)'} cannot be read",
            where=source.name,
            fix=f"data.source takes {', '.join(sorted(_FORMATS))}",
        )
    size = _size(source)
    if format_ == "parquet":
        metadata = _open_parquet(source.path).metadata
        if metadata.num_rows == 0:
            raise DataError("the file holds no rows", where=source.name, fix="leave it out of data.source")
        for group in range(metadata.num_row_groups):
            share = size * metadata.row_group(group).num_rows // metadata.num_rows
            yield Piece(number, source.path, format_, group, group + 1, share)
    elif format_ == "txt" and not lines:
        yield Piece(number, source.path, format_, 0, size, size)
    else:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(number, source.path, "lines" if format_ == "txt" else format_, start, stop, stop - start)


def _limited(piece: Piece, limit: int) -> tuple[Piece, int]:
    """The piece with at most ``limit`` rows, and how many it has."""
    if piece.format == "txt":
        return piece, 1
    rows = length(piece) if piece.format == "parquet" else sum(1 for _ in islice(_rows_of_lines(piece), limit))
    return (replace(piece, limit=limit), limit) if rows >= limit else (piece, rows)


def read(piece: Piece, columns: Columns) -> Iterator[Record]:
    """The records of a piece, streamed.

    Raises:
        DataError: The text is not UTF-8, JSON is broken, a column is missing or not text, or a parquet file is damaged.
    """
    records = {"txt": _read_txt, "lines": _read_lines, "jsonl": _read_jsonl, "parquet": _read_parquet}
    return islice(records[piece.format](piece, columns), piece.limit)


def length(piece: Piece) -> int:
    """Lines (blank ones too) or rows of a piece, whatever its limit: where the next piece's numbers start."""
    if piece.format == "txt":
        return 1
    if piece.format == "parquet":
        return int(_open_parquet(piece.path).metadata.row_group(piece.start).num_rows)
    return sum(1 for _ in _lines(piece))


def _read_txt(piece: Piece, columns: Columns) -> Iterator[Record]:
    _require(columns, columns.text[:1], piece, None)
    raw = piece.path.read_bytes()
    offset = len(_BOM) if raw.startswith(_BOM) else 0
    yield Record(1, (_decode(raw[offset:], piece, 1, offset).replace("\r\n", "\n"),))


def _read_lines(piece: Piece, columns: Columns) -> Iterator[Record]:
    _require(columns, columns.text[:1], piece, None)
    for number, offset, raw in _rows_of_lines(piece):
        yield Record(number, (_decode(raw, piece, number, offset),))


def _read_jsonl(piece: Piece, columns: Columns) -> Iterator[Record]:
    for number, offset, raw in _rows_of_lines(piece):
        text = _decode(raw, piece, number, offset)
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"broken JSON: {error}",
                where=_line(piece, number),
                fix="each line must be one JSON object",
            ) from error
        if not isinstance(values, dict):
            raise DataError(
                f"the line holds a {type(values).__name__}, not an object",
                where=_line(piece, number),
                fix='each line must be one JSON object, as {"text": "..."}',
            )
        _require(columns, tuple(values), piece, number)
        yield _record(piece, columns, number, values)


def _read_parquet(piece: Piece, columns: Columns) -> Iterator[Record]:
    file = _open_parquet(piece.path)
    _require(columns, tuple(file.schema_arrow.names), piece, None)
    number = 0
    groups = list(range(piece.start, piece.stop))
    try:
        for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=list(columns.all)):
            for values in batch.to_pylist():
                number += 1
                yield _record(piece, columns, number, values)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"row group {piece.start} cannot be read: {error}",
            where=str(piece.path),
            fix="write or fetch the file again",
        ) from error


def _record(piece: Piece, columns: Columns, number: int, values: dict[str, Any]) -> Record:
    for column in columns.text:
        value = values[column]
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"column {column!r} holds {_shown(value)} of type {type(value).__name__}, not text",
                where=_line(piece, number),
                fix="name a text column in the task section, or turn the values into text",
            )
        if value is not None and not value.isascii():
            _refuse_lone_surrogates(value, piece, number)
    return Record(
        number,
        tuple(values[column] for column in columns.text),
        _plain(piece, columns.group, "data.splits.group_by", number, values),
        _plain(piece, columns.stratum, "data.splits.stratify_by", number, values),
    )


def _refuse_lone_surrogates(value: str, piece: Piece, number: int) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"half a character (\\u{ord(value[error.start]):04x}) at character {error.start} of the text",
            where=_line(piece, number),
            fix="the text was cut within a surrogate pair; write it whole",
        ) from error


def _plain(piece: Piece, column: str | None, key: str, number: int, values: dict[str, Any]) -> str | None:
    if column is None:
        return None
    value = values[column]
    if not isinstance(value, str | int | float | bool):
        raise DataError(
            f"column {column!r} holds {_shown(value)}, which cannot be told from others",
            where=_line(piece, number),
            fix=f"{key} needs text, a number or a boolean in every row",
        )
    return json.dumps(value)


def _require(columns: Columns, present: tuple[str, ...], piece: Piece, number: int | None) -> None:
    for column in columns.all:
        if column not in present:
            kind = "" if piece.format in ("jsonl", "parquet") else f"; a {piece.format} file has no others"
            raise DataError(
                f"there is no column {column!r}",
                where=str(piece.path) if number is None else _line(piece, number),
                fix=f"columns here: {', '.join(present) or 'none'}{kind}",
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _open_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"not a whole parquet file: {error}", where=str(path), fix="it may be cut short; write or fetch it again"
        ) from error


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line with its end) of the lines that begin in the piece."""
    with piece.path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        offset = file.tell()
        while offset < piece.stop and (raw := file.readline()):
            yield offset, raw
            offset += len(raw)


def _rows_of_lines(piece: Piece) -> Iterator[tuple[int, int, bytes]]:
    """(line number in the piece, byte offset, line without its end); blank lines are no rows in jsonl."""
    for number, (offset, raw) in enumerate(_lines(piece), start=1):
        if offset == 0 and raw.startswith(_BOM):
            raw, offset = raw[len(_BOM) :], len(_BOM)
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if piece.format == "lines" or raw.strip():
            yield number, offset, raw


def _decode(raw: bytes, piece: Piece, number: int, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number += raw[: error.start].count(b"\n")
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}",
            where=_line(piece, number),
            fix="turn the file into UTF-8: iconv -f latin1 -t utf-8 OLD > NEW (if it is Latin-1)",
        ) from error


def _line(piece: Piece, number: int) -> str:
    """Where a row is, counted from the start of its file; what lies before the piece is read only now."""
    if piece.format == "parquet":
        metadata = _open_parquet(piece.path).metadata
        number += sum(metadata.row_group(group).num_rows for group in range(piece.start))
        return f"{piece.path}, row {number}"
    before = 0
    with piece.path.open("rb") as file:
        left = piece.start
        while left > 0 and (chunk := file.read(min(left, _SCAN_BYTES))):
            before += chunk.count(b"\n")
            left -= len(chunk)
    if piece.start and number:
        with piece.path.open("rb") as file:
            file.seek(piece.start - 1)
            before += file.read(1) != b"\n"  # the line that runs into the piece is counted as one before it
    return f"{piece.path}, line {before + number}"

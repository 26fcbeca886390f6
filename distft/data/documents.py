"""Documents: the files of a source as records, cut into units of work.

The units depend on the files alone, never on how many processes there are, so that what is prepared from them does
not either: big files are cut (:mod:`distft.data.text_files`, :mod:`distft.data.table_files`), and small ones are taken
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from distft.config.addresses import COMPRESSED, FORMATS, compression, file_type
from distft.data import table_files, text_files
from distft.data.example import Column
from distft.data.piece import Piece
from distft.data.values import as_key, as_text
from distft.errors import DataError

UNIT_BYTES = 1 << 20  # smallest unit of work worth a task of its own
UNITS = 1024  # about how many units a big source is cut into
_TABLE_FORMATS = ("parquet", "arrow")


@dataclass(frozen=True)
class Source:
    """One file of the data source.

    Attributes:
        path: Where it is.
        name: How reports call it; does not depend on where the source lies.
        split: The split it was given for, or None where the splits are drawn.
        weight: Times that each of its training rows is used in an epoch.
    """

    path: Path
    name: str
    split: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Columns:
    """The columns to read: those of the task, and ``group`` and ``stratum``, which may hold any plain value."""

    task: tuple[Column, ...]
    group: str | None = None
    stratum: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every column named, each once."""
        named = (*(column.name for column in self.task), self.group, self.stratum)
        return tuple(dict.fromkeys(column for column in named if column is not None))

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that must be there."""
        optional = {column.name for column in self.task if column.optional}
        return tuple(name for name in self.all if name not in optional or name in (self.group, self.stratum))


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class Record:
    """One row of a source.

    Attributes:
        row: 1-based line of its piece that it begins in (lines, jsonl, csv), or row; 1 in a txt file.
        text: What the task's columns hold, as text; None where a column that is not optional is null or blank.
        group: The group's value as text, where one is asked for.
        stratum: The stratum's value as text, where one is asked for.
    """

    row: int
    text: tuple[str | None, ...]
    group: str | None = None
    stratum: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether a text that must be there is not, so that no example can be made of it."""
        return any(value is None for value in self.text)


def plan_units(sources: Sequence[Source], lines: bool, limit: int | None = None) -> list[Unit]:
    """The source as units of work, in source order.

    Args:
        sources: The files, in order.
        lines: Whether each line of a txt file is a document.
        limit: Keep the first rows only; of each split, where splits are given.

    Raises:
        DataError: A file is missing, empty, of an unknown format, or not what it should be.
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
    _size(source)
    name = source.path.name
    format_ = FORMATS.get(file_type(name))
    if format_ is None or (compression(name) and format_ in _TABLE_FORMATS):
        raise DataError(
            f"files of type {''.join(source.path.suffixes[-2:]) or '(no suffix)'} cannot be read",
            where=source.name,
            fix=f"data.source takes {', '.join(FORMATS)}, all but parquet and arrow also with {', '.join(COMPRESSED)}",
        )
    if format_ == "txt" and lines:
        format_ = "lines"
    return _reader(format_).cut(number, source.path, source.name, format_, unit_bytes)


class _Reader(Protocol):
    """What the modules that read files have in common."""

    def cut(self, number: int, path: Path, name: str, format_: str, unit_bytes: int) -> Iterator[Piece]: ...

    def columns(self, piece: Piece) -> tuple[str, ...] | None: ...

    def rows(self, piece: Piece, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]: ...

    def length(self, piece: Piece) -> int: ...

    def where(self, piece: Piece, number: int) -> str: ...


def _reader(format_: str) -> _Reader:
    return table_files if format_ in _TABLE_FORMATS else text_files


def _limited(piece: Piece, limit: int) -> tuple[Piece, int]:
    """The piece with at most ``limit`` rows, and how many it has."""
    if piece.format == "txt":
        return piece, 1
    if piece.format in _TABLE_FORMATS:
        rows = length(piece)
    else:
        rows = sum(1 for _ in islice(_reader(piece.format).rows(piece, ()), limit))
    return (replace(piece, limit=limit), limit) if rows >= limit else (piece, rows)


def read(piece: Piece, columns: Columns) -> Iterator[Record]:
    """The records of a piece, streamed (a json file is parsed at once).

    Raises:
        DataError: A file is damaged or broken, a column is missing, or a value is not what its column is to hold.
    """
    reader = _reader(piece.format)
    present = reader.columns(piece)
    if present is not None:
        _require(columns, present, piece.name)
    for number, values in islice(reader.rows(piece, columns.all), piece.limit):
        try:
            if present is None:
                _require(columns, tuple(values), None)
            yield _record(columns, number, values)
        except DataError as error:
            raise DataError(error.what, error.where or reader.where(piece, number), error.fix) from error


def length(piece: Piece) -> int:
    """Lines (blank ones too) or rows of a piece, whatever its limit: where the next piece's numbers start.

    0 where no piece of the file comes after it and counting would mean reading it again.
    """
    return _reader(piece.format).length(piece)


def where(piece: Piece, number: int) -> str:
    """Where a row is: its file, and its line or row in it."""
    return _reader(piece.format).where(piece, number)


def _record(columns: Columns, number: int, values: dict[str, Any]) -> Record:
    group, stratum = columns.group, columns.stratum
    return Record(
        number,
        tuple([as_text(column, values.get(column.name)) for column in columns.task]),
        None if group is None else as_key(group, "data.splits.group_by", values[group]),
        None if stratum is None else as_key(stratum, "data.splits.stratify_by", values[stratum]),
    )


def _require(columns: Columns, present: tuple[str, ...], where: str | None) -> None:
    for column in columns.required:
        if column not in present:
            raise DataError(
                f"there is no column {column!r}", where=where, fix=f"columns here: {', '.join(present) or 'none'}"
            )

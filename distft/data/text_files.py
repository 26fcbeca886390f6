"""Files of text: txt, jsonl, json, csv and tsv, plain or compressed, streamed.

A plain file is cut into ranges of bytes: at any byte where each line is a row (a line belongs to the range it begins
in), and for csv at the end of a record, which is a line end with an even number of quotes before it. A txt file that
is one document, a json file (parsed at once) and a compressed file are one piece.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from distft.config.addresses import compression
from distft.data.piece import WHOLE, Piece
from distft.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SCAN_BYTES = 1 << 20
_JSON_BYTES = 1 << 29
_FIELD_LETTERS = 1 << 26  # a field longer than this is an open quote
_UNPACKED = 4  # how much larger a compressed file is thought to be
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_FIELD = r'(?:"[^"]*+(?:""[^"]*+)*+"|[^{0}"\r\n]*+)'
_RECORDS = {
    format_: re.compile(f"{_FIELD}(?:[{{0}}]{_FIELD})*+\\r?\\n?".replace("{0}", delimiter))
    for format_, delimiter in _DELIMITERS.items()
}
"""A record as RFC 4180 has it: Python's csv takes a quote in the midst of a field for a letter."""


def cut(number: int, path: Path, name: str, format_: str, unit_bytes: int) -> Iterator[Piece]:
    """The file as pieces of about ``unit_bytes``."""
    size = path.stat().st_size
    whole = Piece(number, path, name, format_, 0, WHOLE, size)
    if format_ == "json" and _holds_json_lines(whole):
        format_ = "jsonl"
    if compression(path.name):
        yield replace(whole, format=format_, size_bytes=_UNPACKED * size)
    elif format_ in ("txt", "json") or size <= unit_bytes:
        yield replace(whole, format=format_, stop=size)
    else:
        ends = _record_ends(path, unit_bytes) if format_ in _DELIMITERS else range(unit_bytes, size, unit_bytes)
        start = 0
        for stop in (*(end for end in ends if end < size), size):
            yield Piece(number, path, name, format_, start, stop, stop - start)
            start = stop


def columns(piece: Piece) -> tuple[str, ...] | None:
    """The columns of the file; None where each row has its own (jsonl, json).

    A txt file has the columns ``text`` and ``source``, its name.

    Raises:
        DataError: The header of a csv file is none.
    """
    if piece.format in _DELIMITERS:
        return _header(piece)
    return ("text", "source") if piece.format in ("txt", "lines") else None


def rows(piece: Piece, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line in the piece that the row begins in, or row of a json file; its values).

    Raises:
        DataError: The text is not UTF-8, the JSON or csv is broken, or a compressed file is damaged.
    """
    match piece.format:
        case "txt":
            return _document(piece)
        case "lines":
            found = _lines_without_ends(piece)
            return (
                (number, {"text": _decode(raw, piece, number, at), "source": piece.name}) for number, at, raw in found
            )
        case "jsonl":
            return _json_lines(piece)
        case "json":
            return _json_array(piece)
    return _records_of_fields(piece)


def length(piece: Piece) -> int:
    """Lines of the piece (blank ones too), whatever its limit; 0 where the file is one piece, and none comes after."""
    return 0 if piece.stop == WHOLE or piece.format in ("txt", "json") else sum(1 for _ in _lines(piece))


def where(piece: Piece, number: int) -> str:
    """Where a row is, counted from the start of its file; what lies before the piece is read only now."""
    if piece.format == "json":
        return f"{piece.name}, row {number}"
    before = 0
    if piece.start:
        with piece.path.open("rb") as file:
            left = piece.start
            while left > 0 and (chunk := file.read(min(left, _SCAN_BYTES))):
                before += chunk.count(b"\n")
                left -= len(chunk)
            file.seek(piece.start - 1)
            before += file.read(1) != b"\n"  # the line that runs into the piece is counted as one before it
    return f"{piece.name}, line {before + number}"


def _document(piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(piece) as stream:
        raw = stream.read()
    offset = len(_BOM) if raw.startswith(_BOM) else 0
    text = _decode(raw[offset:], piece, 1, offset).replace("\r\n", "\n")
    yield 1, {"text": text, "source": piece.name}


def _json_lines(piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, offset, raw in _lines_without_ends(piece):
        if not raw.strip():
            continue
        values = _parsed(_decode(raw, piece, number, offset), piece, number, "each line must be one JSON object")
        if not isinstance(values, dict):
            raise DataError(
                f"the line holds a {type(values).__name__}, not an object",
                where=where(piece, number),
                fix='each line must be one JSON object, as {"text": "..."}',
            )
        yield number, values


def _json_array(piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(piece) as stream:
        raw = stream.read(_JSON_BYTES + 1).removeprefix(_BOM)
    if len(raw) > _JSON_BYTES:
        raise DataError(
            f"a json file is parsed at once, and this one is larger than {_JSON_BYTES >> 20} MiB",
            where=piece.name,
            fix="turn it into jsonl, which is streamed: jq -c '.[]' OLD.json > NEW.jsonl",
        )
    shape = 'a json file is one array of objects, or one object with one such array: [{"text": "..."}, ...]'
    value = _parsed(_decode(raw, piece, 1, 0), piece, None, shape)
    if isinstance(value, dict):
        arrays = [key for key, inner in value.items() if isinstance(inner, list) and any(map(_is_object, inner))]
        if len(arrays) != 1:
            found = f"{len(arrays)} arrays of objects: {', '.join(arrays)}" if arrays else "no array of objects"
            raise DataError(f"the object holds {found}", where=piece.name, fix=shape)
        value = value[arrays[0]]
    if not isinstance(value, list):
        raise DataError(f"the file holds a {type(value).__name__}, not an array", where=piece.name, fix=shape)
    for number, values in enumerate(value, start=1):
        if not isinstance(values, dict):
            what = f"the row is a {type(values).__name__}, not an object"
            raise DataError(what, where=where(piece, number), fix=shape)
        yield number, values


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _parsed(text: str, piece: Piece, number: int | None, fix: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = piece.name if number is None else where(piece, number)
        raise DataError(f"broken JSON: {error}", where=place, fix=fix) from error


def _holds_json_lines(piece: Piece) -> bool:
    """Whether a file called json has an object a line, as many on the hub do."""
    with _opened(piece) as stream:
        first, second = stream.readline(_SCAN_BYTES).removeprefix(_BOM), stream.readline(_SCAN_BYTES)
    try:
        return second.lstrip().startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _records_of_fields(piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
    names = _header(piece)
    for number, fields in _records(piece):
        if piece.start == 0 and number == 1:
            continue
        if len(fields) != len(names):
            raise DataError(
                f"{len(fields)} fields, where the header has {len(names)}: {', '.join(names)}",
                where=where(piece, number),
                fix="put quotes around a field that holds the delimiter or a line end, or write the missing fields",
            )
        yield number, dict(zip(names, fields, strict=True))


def _header(piece: Piece) -> tuple[str, ...]:
    _, names = next(_records(replace(piece, start=0, stop=WHOLE)), (1, []))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not any(name.strip() for name in names):
        what = f"the header names {repeated[0]!r} twice" if repeated else "the file has no header"
        raise DataError(what, where=piece.name, fix="the first line names the columns, each once")
    return tuple(names)


def _records(piece: Piece) -> Iterator[tuple[int, list[str]]]:
    """(line in the piece that it begins in, fields) of each csv record; blank lines are none."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for number, (offset, raw) in enumerate(_lines(piece), start=1):
            skipped = len(_BOM) if offset == 0 and raw.startswith(_BOM) else 0
            taken.append(_decode(raw[skipped:], piece, number, offset + skipped))
            yield taken[-1]

    csv.field_size_limit(_FIELD_LETTERS)
    reader = csv.reader(lines(), delimiter=_DELIMITERS[piece.format], strict=True)
    while True:
        number = reader.line_num + 1
        taken.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _stray_quote(piece, number, f"the record that begins here is broken: {error}") from error
        if fields is None:
            return
        record = "".join(taken)
        if '"' in record and not _RECORDS[piece.format].fullmatch(record):
            raise _stray_quote(piece, number, "a stray quote, in a field that does not begin with one")
        if fields:
            yield number, fields


def _stray_quote(piece: Piece, number: int, what: str) -> DataError:
    fix = 'a field with quotes in it stands in quotes, and each of them is doubled: "she said ""yes"""'
    return DataError(what, where=where(piece, number), fix=fix)


def _record_ends(path: Path, unit_bytes: int) -> Iterator[int]:
    """Offsets where a csv record ends, about ``unit_bytes`` apart.

    Within quotes an odd number of quotes lies before. Where the file is broken, the piece that holds the first stray
    quote still begins right, and is refused.
    """
    with path.open("rb") as file:
        while True:
            quotes, left = 0, unit_bytes
            while left > 0 and (chunk := file.read(min(left, _SCAN_BYTES))):
                quotes += chunk.count(b'"')
                left -= len(chunk)
            while line := file.readline():
                quotes += line.count(b'"')
                if quotes % 2 == 0:
                    break
            else:
                return
            yield file.tell()


@contextmanager
def _opened(piece: Piece) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed.

    Raises:
        DataError: A compressed file is cut short or damaged.
    """
    ending = compression(piece.path.name)
    with piece.path.open("rb") as file:
        try:
            yield _decompressed(file, ending)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if not ending:
                raise
            raise DataError(
                f"the {ending} file is cut short or damaged: {error}", where=piece.name, fix="write or fetch it again"
            ) from error


def _decompressed(file: BinaryIO, ending: str) -> BinaryIO:
    match ending:
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=file))
        case ".bz2":
            return cast(BinaryIO, bz2.BZ2File(file))
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(file))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")))
    return file


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line with its end) of the lines that begin in the piece."""
    with _opened(piece) as stream:
        offset = 0
        if piece.start:
            stream.seek(piece.start - 1)
            offset = piece.start - 1 + len(stream.readline())
        while offset < piece.stop and (raw := stream.readline()):
            yield offset, raw
            offset += len(raw)


def _lines_without_ends(piece: Piece) -> Iterator[tuple[int, int, bytes]]:
    """(line number in the piece, byte offset, line without its end)."""
    for number, (offset, raw) in enumerate(_lines(piece), start=1):
        if offset == 0 and raw.startswith(_BOM):
            raw, offset = raw[len(_BOM) :], len(_BOM)
        yield number, offset, raw.removesuffix(b"\n").removesuffix(b"\r")


def _decode(raw: bytes, piece: Piece, number: int, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number += raw[: error.start].count(b"\n")
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}",
            where=where(piece, number),
            fix="turn the file into UTF-8: iconv -f latin1 -t utf-8 OLD > NEW (if it is Latin-1)",
        ) from error

"""A part of one file: what a reader of some format is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WHOLE = 1 << 62
"""Where a piece stops whose file is read to its end."""


@dataclass(frozen=True)
class Piece:
    """A part of one file.

    Attributes:
        source: The file's number in the list of sources.
        path: Where it is.
        name: How errors call it.
        format: "txt" (the file is one document), "lines" (each line is), "jsonl", "json", "csv", "tsv", "parquet" or
            "arrow".
        start: First byte, row group (parquet) or record batch (arrow).
        stop: The byte, row group or record batch after the last; or ``WHOLE``.
        size_bytes: About how much work it is.
        limit: Rows to read at most.
    """

    source: int
    path: Path
    name: str
    format: str
    start: int
    stop: int
    size_bytes: int
    limit: int | None = None

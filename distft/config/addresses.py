"""What kind of place an address names, by its spelling alone: nothing here looks at a disk or a network."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

TABLES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"}
"""File types whose rows have columns."""

COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}

PYPI = re.compile(r"pypi://[A-Za-z0-9][\w.-]*==[\w.!+-]+/.+")
"""pypi://PACKAGE==VERSION/path/in/wheel."""


def scheme(address: str) -> str:
    """``s3`` of ``s3://bucket/key``; empty for a path or a hub id."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    return match[1].lower() if match else ""


def file_type(address: str) -> str:
    """``.jsonl`` of ``data/*.jsonl``, ``.gz`` of ``rows.jsonl.gz``; empty where the spelling does not tell."""
    path = address.partition("://")[2].partition("/")[2] if scheme(address) else address
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]*", suffix) else ""


def is_path(source: str) -> bool:
    """Whether a model's source can only be a local path, and no hub id."""
    return not scheme(source) and (
        source.startswith(("/", ".", "~")) or source.endswith(".gguf") or source.count("/") > 1
    )


def is_hub_id(source: str) -> bool:
    """Whether a model's source may be a hub id, ``name`` or ``owner/name``; a relative folder may look the same."""
    return not is_path(source) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source, re.ASCII) is not None

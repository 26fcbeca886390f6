"""Building the whole from its units: splits, weights, labels, leaks, rows, card, manifest.

Rows are made in the order of their documents' content, so neither the order and names of the files nor the number of
processes show in them.

Memory: no object for a document, arrays throughout, and of the indexes on disk only the columns in use. For each
document 26 bytes are held from beginning to end (source, row, fate, split, copies, label, tokens: 1 to 8 each) and at
most about 110 more for a while: drawing the splits (digests, their order, their hashes), packing (digests, segments,
order, rows), or copies (digests, ranks, the keys of one band and their order). So 2.5 million documents, which are 5 GB
of text at 2 KB each, take 0.35 GB beside the libraries' 0.15. See ``benchmarks/prepare.py --memory``.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distft.data import card, digests, duplicates, labels, mixture, store, units
from distft.data.documents import Source, Unit
from distft.data.example import EMPTY, FATES, LEFT_OUT, OVERLONG
from distft.data.index import Index
from distft.data.labels import Labels
from distft.data.rows import SplitRows, rows_of
from distft.data.splits import SPLITS, TRAIN, assign, refuse_empty
from distft.data.units import Report
from distft.errors import DataError
from distft.runs import write_json

FORMAT = 3  # raise it when what is written for the same content changes
_ROWS_FORMAT = 2  # raise it when the rows do
_NAMED = 5


@dataclass(frozen=True)
class Setting:
    """What a folder is built from, beside the files and the task.

    Attributes:
        seed: Decides the splits, and what a mixture's weights leave out.
        shares: Wanted share of "validation" and "test"; unused where the sources are split already.
        group_by: Column whose values are kept in one split.
        stratify_by: Column whose values have the same share in every split.
        max_tokens: Tokens of a row.
        packing: Whether a row holds several segments.
        labels: The labels in the order of their numbers; None: those found.
        facts: What the card tells of the task, plain values.
    """

    seed: int
    shares: Mapping[str, float]
    group_by: str | None
    stratify_by: str | None
    max_tokens: int
    packing: bool
    labels: tuple[str, ...] | None
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class _Rows:
    """Every row of the source, in source order, arrays (rows,): where it is from and what became of it."""

    names: tuple[str, ...]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    fate: NDArray[np.int8]
    split: NDArray[np.int8]
    copies: NDArray[np.int32]
    tokens: NDArray[np.int32]

    def place(self, row: int) -> dict[str, Any]:
        """Where a row stands."""
        return {"source": self.names[self.source[row]], "row": int(self.row[row])}

    def named(self, rows: NDArray[np.int64]) -> str:
        """The first few, for a person."""
        told = [f"{place['source']} row {place['row']:,}" for place in map(self.place, rows[:_NAMED].tolist())]
        return ", ".join(told) + (f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else "")


def finish(
    folder: Path,
    reports: Sequence[Report],
    sources: Sequence[Source],
    plan: Sequence[Unit],
    setting: Setting,
) -> None:
    """Makes a whole prepared folder of one that holds the files of every unit.

    Args:
        folder: Where the units wrote; their indexes are deleted.
        reports: One for each unit, in order, none with an error.
        sources: The files.
        plan: The units of work.
        setting: What decides splits and rows.

    Raises:
        DataError: Documents are too long under ``overlong: error``, a split is empty, nothing is a target, or a label
            is in no training document.
    """
    parts = [(report.unit, part, rows) for report in reports for part, rows in enumerate(report.rows)]
    index = Index.open([units.index_path(folder, *part) for *part, _ in parts], [rows for *_, rows in parts])
    content = index.digests("content")
    rows = _rows(index, reports, sources, plan, content, setting)
    lengths = card.length_statistics(rows.tokens[rows.fate != FATES.index(EMPTY)])
    _refuse_overlong(rows, lengths, setting.max_tokens)
    numbered = _labels(index, rows, setting)
    packed = _packed(index, rows, content, setting)
    del content
    _refuse_useless(rows, packed, sources, setting)
    for split, made in packed.items():
        store.write_arrow(folder / f"rows-{split}.arrow", made.columns())
    store.write_arrow(folder / store.DOCUMENTS, _documents(index, rows, numbered))
    write_json(folder / store.CARD, _card(index, rows, numbered, packed, sources, lengths, setting))
    store.seal(folder)
    shutil.rmtree(folder / units.UNITS)


def _rows(
    index: Index,
    reports: Sequence[Report],
    sources: Sequence[Source],
    plan: Sequence[Unit],
    content: NDArray[np.uint64],
    setting: Setting,
) -> _Rows:
    source, row = index.numbers("piece", np.int32), index.numbers("row", np.int64)
    before: dict[int, int] = {}  # lines or rows of a source before the piece
    begin = 0
    for unit, report in zip(plan, reports, strict=True):
        end = begin + sum(report.rows)
        bases = []
        for piece, length in zip(unit, report.lengths, strict=True):
            bases.append(before.get(piece.source, 0))
            before[piece.source] = bases[-1] + length
        pieces = source[begin:end]
        row[begin:end] += np.array(bases, dtype=np.int64)[pieces]
        source[begin:end] = np.array([piece.source for piece in unit], dtype=np.int32)[pieces]
        begin = end
    fate = index.numbers("fate", np.int8)
    split = _splits(index, source, fate, sources, setting)
    has_segments = index.counts("start") > 0
    weights = [one.weight for one in sources]
    copies = mixture.copies(weights, source, content, has_segments & (split == TRAIN), setting.seed)
    fate[has_segments & (copies == 0)] = FATES.index(LEFT_OUT)
    copies[~has_segments] = 0
    return _Rows(
        tuple(one.name for one in sources), source, row, fate, split, copies, index.numbers("tokens", np.int32)
    )


def _splits(
    index: Index, source: NDArray[np.int32], fate: NDArray[np.int8], sources: Sequence[Source], setting: Setting
) -> NDArray[np.int8]:
    """The split of each row; -1 for rows without text. Length plays no part: it depends on the tokenizer."""
    splits = np.full(len(fate), -1, dtype=np.int8)
    used = np.flatnonzero(fate != FATES.index(EMPTY))
    if sources[0].split is not None:
        numbers = np.array([SPLITS.index(source.split or "") for source in sources], dtype=np.int8)
        splits[used] = numbers[source[used]]
        return splits
    strata = index.codes("stratum")[0][used] if setting.stratify_by else None
    splits[used] = assign(index.digests("unit")[used], setting.shares, setting.seed, strata)
    return splits


def _labels(index: Index, rows: _Rows, setting: Setting) -> Labels:
    codes, found = index.codes("label")
    codes[rows.copies == 0] = -1
    return labels.number(codes, found, rows.split, setting.labels, rows.place)


def _packed(index: Index, rows: _Rows, content: NDArray[np.uint64], setting: Setting) -> dict[str, SplitRows]:
    spans = index.spans()
    return {
        split: rows_of(
            np.flatnonzero((rows.split == number) & (rows.copies > 0)),
            rows.copies,
            content,
            spans,
            setting.max_tokens,
            setting.packing,
        )
        for number, split in enumerate(SPLITS)
    }


def _refuse_overlong(rows: _Rows, lengths: Mapping[str, Any], max_tokens: int) -> None:
    overlong = np.flatnonzero(rows.fate == FATES.index(OVERLONG))
    if len(overlong):
        longest = overlong[np.argsort(-rows.tokens[overlong], kind="stable")]
        raise DataError(
            f"{len(overlong):,} of {lengths['n']:,} documents are longer than data.max_tokens = {max_tokens:,} tokens "
            f"(min {lengths['min']:,}, median {lengths['median']:,}, p95 {lengths['p95']:,}, max {lengths['max']:,}), "
            f"the longest first: {rows.named(longest)}",
            where="data.overlong",
            fix="set data.overlong to split, truncate or drop, or raise data.max_tokens",
        )


def _refuse_useless(rows: _Rows, packed: Mapping[str, SplitRows], sources: Sequence[Source], setting: Setting) -> None:
    if not (rows.split >= 0).any():
        raise DataError(
            f"none of the {len(rows.split):,} rows holds any text",
            where="data.source",
            fix="see the source's text column",
        )
    given = {source.split for source in sources if source.split}
    refuse_empty(
        {split: len(made) for split, made in packed.items()},
        {split: int((rows.split == number).sum()) for number, split in enumerate(SPLITS)},
        dict.fromkeys(given, 1.0) if given else setting.shares,
    )
    if not packed["train"].supervised.any():
        raise DataError(
            "no token of the training split is a target: there is nothing to learn from; "
            f"its rows: {rows.named(np.flatnonzero(rows.split == TRAIN))}",
            where="data.source",
            fix="look at the examples' prompts and responses, and at data.max_tokens",
        )


def _documents(index: Index, rows: _Rows, numbered: Labels) -> dict[str, pa.Array]:
    begins = index.begins
    digest = pa.py_buffer(digests.content(index.digests("digest")))
    return {
        "source": pa.DictionaryArray.from_arrays(pa.array(rows.source), pa.array(rows.names)),
        "row": pa.array(rows.row),
        "split": pa.array(rows.split),
        "fate": pa.DictionaryArray.from_arrays(pa.array(rows.fate), pa.array(FATES)),
        "copies": pa.array(rows.copies),
        "text_bytes": pa.array(index.numbers("text_bytes", np.int64)),
        "scored_bytes": pa.array(index.numbers("scored_bytes", np.int64)),
        "tokens": pa.array(rows.tokens),
        "label": pa.array(numbered.numbers),
        "digest": pa.Array.from_buffers(pa.binary(digests.DIGEST_BYTES), len(index), [None, digest]),
        "part": pa.array(np.repeat(np.arange(len(begins) - 1, dtype=np.int32), np.diff(begins))),
        "offset": pa.array(index.numbers("offset", np.int64)),
    }


def _card(
    index: Index,
    rows: _Rows,
    numbered: Labels,
    packed: Mapping[str, SplitRows],
    sources: Sequence[Source],
    lengths: dict[str, Any],
    setting: Setting,
) -> dict[str, Any]:
    """The data card (contract, section 3)."""
    scored = index.numbers("scored_bytes", np.int64)
    scored[rows.copies == 0] = 0
    return {
        "format": FORMAT,
        "fingerprint": _fingerprint(packed, numbered),
        "source": {
            "files": len(sources),
            "bytes": sum(source.path.stat().st_size for source in sources),
            "rows": len(index),
        },
        "task": dict(setting.facts),
        "rows": card.rows_by_fate(rows.split, rows.fate),
        "packed": {split: len(made) for split, made in packed.items()},
        "tokens": {
            split: card.token_counts(made.tokens, made.supervised, setting.max_tokens) for split, made in packed.items()
        },
        "scored_bytes": {split: int(scored[rows.split == number].sum()) for number, split in enumerate(SPLITS)},
        "labels": {"names": list(numbered.names), "rows": numbered.counts(rows.split, rows.copies)},
        "lengths": lengths,
        "cut": index.cut(rows.copies > 0),
        "unlearnt": card.unlearnt(rows.place, index.numbers("unlearnt", np.int32) * (rows.copies > 0)),
        "examples": card.examples(rows.place, rows.fate),
        "leaks": _leaks(index, rows),
        "settings": {
            "seed": setting.seed,
            "shares": dict(setting.shares),
            "group_by": setting.group_by,
            "stratify_by": setting.stratify_by,
            "max_tokens": setting.max_tokens,
            "packing": setting.packing,
        },
    }


def _fingerprint(packed: Mapping[str, SplitRows], numbered: Labels) -> str:
    """A hash of what training sees: the rows of every split, in order, and what the labels' numbers mean."""
    fingerprint = hashlib.blake2b(f"distft {_ROWS_FORMAT}".encode(), digest_size=16)
    for split, made in packed.items():
        fingerprint.update(split.encode() + made.ids.tobytes())
    for name in numbered.names:
        fingerprint.update(b"\0" + name.encode())
    return fingerprint.hexdigest()


def _leaks(index: Index, rows: _Rows) -> dict[str, Any]:
    texts = index.digests("digest")
    exact = duplicates.exact(texts, rows.split)
    bands = (index.numbers(name, np.uint64) for name in duplicates.BANDS)
    near = duplicates.near(bands, index.signatures, texts, rows.split)
    within = {split: duplicates.copies_within(texts, rows.split, number) for number, split in enumerate(SPLITS)}

    def shown(document: int) -> dict[str, Any]:
        text = index.text("excerpt", document)
        return {"split": SPLITS[rows.split[document]], **rows.place(document), "text": text}

    return {
        "exact": {"within": within, **card.leaks(exact, shown)},
        "near": {"threshold": duplicates.THRESHOLD, **card.leaks(near, shown)},
    }

"""Building the whole from its units: splits, leaks, rows, card, manifest.

Rows are made in the order of their documents' content, so neither the order and names of the files nor the number of
processes show in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distft.data import card, duplicates, store
from distft.data.documents import Source, Unit
from distft.data.example import EMPTY, FATES, OVERLONG
from distft.data.packing import pack
from distft.data.splits import SPLITS, assign, refuse_empty
from distft.data.units import Report
from distft.errors import DataError
from distft.runs import write_json

FORMAT = 1  # raise it when what is written for the same content changes


@dataclass(frozen=True)
class Setting:
    """What a folder is built from, beside the files and the task.

    Attributes:
        seed: Decides the splits.
        shares: Wanted share of "validation" and "test"; unused where the sources are split already.
        group_by: Column whose values are kept in one split.
        stratify_by: Column whose values have the same share in every split.
        max_tokens: Tokens of a row.
        packing: Whether a row holds several segments.
    """

    seed: int
    shares: Mapping[str, float]
    group_by: str | None
    stratify_by: str | None
    max_tokens: int
    packing: bool


@dataclass(frozen=True)
class _Gathered:
    """What the units know of every row of the source, in source order."""

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    part: NDArray[np.int32]
    offset: NDArray[np.int64]
    fate: NDArray[np.int8]
    text_bytes: NDArray[np.int64]
    scored_bytes: NDArray[np.int64]
    tokens: NDArray[np.int64]
    signature: NDArray[np.uint32]
    digest: list[bytes]
    unit: list[bytes]
    stratum: list[str]
    content: list[bytes]
    spans: list[list[tuple[int, int]]]


def finish(
    folder: Path,
    reports: Sequence[Report],
    sources: Sequence[Source],
    units: Sequence[Unit],
    setting: Setting,
) -> None:
    """Makes a whole prepared folder of one that holds the files of every unit.

    Args:
        folder: Where the units wrote; the indexes in it are used up.
        reports: One for each unit, in order, none with an error.
        sources: The files.
        units: The units of work.
        setting: What decides splits and rows.

    Raises:
        DataError: Documents are too long under ``overlong: error``, a split is empty, or nothing is a target.
    """
    gathered = _gather(folder, reports, units)
    lengths = card.length_statistics(gathered.tokens[gathered.fate != FATES.index(EMPTY)])
    _refuse_overlong(gathered.fate, lengths, setting.max_tokens)
    splits = _splits(gathered, sources, setting)
    masks = _masks(folder, len(units))
    chosen = {split: np.flatnonzero(splits == number) for number, split in enumerate(SPLITS)}
    rows = {split: _rows(numbers, gathered, masks, setting) for split, numbers in chosen.items()}
    _refuse_useless(gathered, splits, rows, sources, setting)
    for split, columns in rows.items():
        store.write_arrow(folder / f"rows-{split}.arrow", columns)
    names = [sources[number].name for number in gathered.source]
    store.write_arrow(folder / store.DOCUMENTS, _documents(gathered, names, splits))
    write_json(folder / store.CARD, _card(gathered, names, splits, rows, sources, lengths, setting))
    for path in folder.glob("index-*.arrow"):
        path.unlink()
    store.seal(folder)


def _gather(folder: Path, reports: Sequence[Report], units: Sequence[Unit]) -> _Gathered:
    batches = [store.map_arrow(folder / f"index-{number:05d}.arrow") for number in range(len(units))]
    table = pa.Table.from_batches(batches)
    before: dict[int, int] = {}  # lines or rows of a source before the piece
    source, base = [], []
    for batch, unit, report in zip(batches, units, reports, strict=True):
        bases = []
        for piece, length in zip(unit, report.lengths, strict=True):
            bases.append(before.get(piece.source, 0))
            before[piece.source] = bases[-1] + length
        pieces = batch["piece"].to_numpy()
        source.append(np.array([piece.source for piece in unit], dtype=np.int64)[pieces])
        base.append(np.array(bases, dtype=np.int64)[pieces])
    signature = b"".join(table["signature"].to_pylist())
    return _Gathered(
        source=np.concatenate(source),
        row=table["row"].to_numpy() + np.concatenate(base),
        part=np.repeat(np.arange(len(batches), dtype=np.int32), [len(batch) for batch in batches]),
        signature=np.frombuffer(signature, dtype=np.uint32).reshape(len(table), -1),
        spans=[
            list(zip(starts, lengths, strict=True))
            for starts, lengths in zip(table["start"].to_pylist(), table["length"].to_pylist(), strict=True)
        ],
        **{name: table[name].to_numpy() for name in ("offset", "fate", "text_bytes", "scored_bytes", "tokens")},
        **{name: table[name].to_pylist() for name in ("digest", "unit", "stratum", "content")},
    )


def _refuse_overlong(fates: NDArray[np.int8], lengths: Mapping[str, Any], max_tokens: int) -> None:
    count = int((fates == FATES.index(OVERLONG)).sum())
    if count:
        raise DataError(
            f"{count:,} of {lengths['n']:,} documents are longer than data.max_tokens = {max_tokens:,} tokens "
            f"(min {lengths['min']:,}, median {lengths['median']:,}, p95 {lengths['p95']:,}, max {lengths['max']:,})",
            where="data.overlong",
            fix="set data.overlong to split, truncate or drop, or raise data.max_tokens",
        )


def _splits(gathered: _Gathered, sources: Sequence[Source], setting: Setting) -> NDArray[np.int8]:
    """The split of each row; -1 for rows without text. Length plays no part: it depends on the tokenizer."""
    splits = np.full(len(gathered.fate), -1, dtype=np.int8)
    used = np.flatnonzero(gathered.fate != FATES.index(EMPTY))
    if sources[0].split is not None:
        numbers = np.array([SPLITS.index(source.split or "") for source in sources], dtype=np.int8)
        splits[used] = numbers[gathered.source[used]]
        return splits
    strata = [gathered.stratum[one] for one in used] if setting.stratify_by else None
    splits[used] = assign([gathered.unit[one] for one in used], setting.shares, setting.seed, strata)
    return splits


def _masks(folder: Path, parts: int) -> list[NDArray[np.uint8] | None]:
    batches = [store.map_arrow(folder / f"tokens-{part:05d}.arrow") for part in range(parts)]
    return [batch["supervised"].to_numpy() if "supervised" in batch.schema.names else None for batch in batches]


def _rows(
    chosen: NDArray[np.int64], gathered: _Gathered, masks: Sequence[NDArray[np.uint8] | None], setting: Setting
) -> dict[str, pa.Array]:
    """The rows of one split as columns."""
    by_content = sorted(chosen.tolist(), key=lambda document: (gathered.content[document], document))
    segments = [(document, *span) for document in by_content for span in gathered.spans[document]]
    lengths = np.array([length for _, _, length in segments], dtype=np.int64)
    rows = pack(lengths, setting.max_tokens) if setting.packing else [[one] for one in range(len(segments))]
    targets = np.array([_targets(segment, gathered, masks) for segment in segments], dtype=np.int64)
    flat = [number for row in rows for number in row]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    part = {
        name: pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array([segments[number][place] for number in flat], pa.int64())
        )
        for place, name in enumerate(("document", "start", "length"))
    }
    ids = [_row_id([(gathered.content[segments[one][0]], *segments[one][1:]) for one in row]) for row in rows]
    return {
        "id": pa.array(ids, pa.uint64()),
        "tokens": pa.array([int(lengths[row].sum()) for row in rows], pa.int32()),
        "supervised": pa.array([int(targets[row].sum()) for row in rows], pa.int32()),
        **part,
    }


def _targets(segment: tuple[int, int, int], gathered: _Gathered, masks: Sequence[NDArray[np.uint8] | None]) -> int:
    document, start, length = segment
    mask = masks[gathered.part[document]]
    if mask is None:
        return length - 1
    first = int(gathered.offset[document]) + start
    return int(mask[first + 1 : first + length].sum())


def _row_id(segments: Sequence[tuple[bytes, int, int]]) -> int:
    """A hash of what a row holds: 8 bytes, of the content of its documents and of what is used of them."""
    digest = hashlib.blake2b(digest_size=8)
    for content, start, length in segments:
        digest.update(content + start.to_bytes(8, "little") + length.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _refuse_useless(
    gathered: _Gathered,
    splits: NDArray[np.int8],
    rows: Mapping[str, Mapping[str, pa.Array]],
    sources: Sequence[Source],
    setting: Setting,
) -> None:
    if not (splits >= 0).any():
        raise DataError(
            f"none of the {len(splits):,} rows holds any text", where="data.source", fix="see the source's text column"
        )
    given = {source.split for source in sources if source.split}
    refuse_empty(
        {split: len(columns["id"]) for split, columns in rows.items()},
        {split: int((splits == number).sum()) for number, split in enumerate(SPLITS)},
        dict.fromkeys(given, 1.0) if given else setting.shares,
    )
    if not sum(rows["train"]["supervised"].to_pylist()):
        raise DataError(
            "no token of the training split is a target: there is nothing to learn from",
            where="data.source",
            fix="look at the examples' prompts and responses, and at data.max_tokens",
        )


def _documents(gathered: _Gathered, names: Sequence[str], splits: NDArray[np.int8]) -> dict[str, pa.Array]:
    return {
        "source": pa.array(names, pa.string()),
        "row": pa.array(gathered.row),
        "split": pa.array(splits),
        "fate": pa.array([FATES[fate] for fate in gathered.fate]),
        "used": pa.array([bool(spans) for spans in gathered.spans]),
        "text_bytes": pa.array(gathered.text_bytes),
        "scored_bytes": pa.array(gathered.scored_bytes),
        "tokens": pa.array(gathered.tokens),
        "digest": pa.array(gathered.digest, pa.binary(16)),
        "part": pa.array(gathered.part),
        "offset": pa.array(gathered.offset),
    }


def _card(
    gathered: _Gathered,
    names: Sequence[str],
    splits: NDArray[np.int8],
    rows: Mapping[str, Mapping[str, pa.Array]],
    sources: Sequence[Source],
    lengths: dict[str, Any],
    setting: Setting,
) -> dict[str, Any]:
    """The data card (contract, section 3)."""
    fingerprint = hashlib.blake2b(f"distft {FORMAT}".encode(), digest_size=16)
    for split in SPLITS:
        fingerprint.update(split.encode() + rows[split]["id"].to_numpy().tobytes())
    exact = duplicates.exact(gathered.digest, splits)
    near = duplicates.near(gathered.signature, gathered.digest, splits)
    return {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "source": {
            "files": len(sources),
            "bytes": sum(source.path.stat().st_size for source in sources),
            "rows": len(splits),
        },
        "rows": card.rows_by_fate(splits, gathered.fate),
        "packed": {split: len(rows[split]["id"]) for split in SPLITS},
        "tokens": {
            split: card.token_counts(
                rows[split]["tokens"].to_numpy(), rows[split]["supervised"].to_numpy(), setting.max_tokens
            )
            for split in SPLITS
        },
        "scored_bytes": {
            split: int(gathered.scored_bytes[splits == number].sum()) for number, split in enumerate(SPLITS)
        },
        "lengths": lengths,
        "examples": card.examples(names, gathered.row, gathered.fate),
        "leaks": {
            "exact": {
                "within": {
                    split: duplicates.copies_within(gathered.digest, splits, number)
                    for number, split in enumerate(SPLITS)
                },
                **card.leaks(exact, names, gathered.row, splits),
            },
            "near": {"threshold": duplicates.THRESHOLD, **card.leaks(near, names, gathered.row, splits)},
        },
        "settings": {
            "seed": setting.seed,
            "shares": dict(setting.shares),
            "group_by": setting.group_by,
            "stratify_by": setting.stratify_by,
            "max_tokens": setting.max_tokens,
            "packing": setting.packing,
        },
    }

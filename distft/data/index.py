"""What preparing knows of every document, written part by part and read back a column at a time.

An index takes about 1,000 bytes of disk a document, most of it the MinHash signature; it is deleted when the
data is prepared. Nothing of it stays in memory but the columns in use: each file is mapped, copied from, let go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distft.data import digests, duplicates, ragged, store
from distft.data.documents import Columns, Record
from distft.data.example import EMPTY, FATES, Example, Task

_EXCERPT = 80  # letters
_PART_TOKENS = 1 << 23
_PART_ROWS = 1 << 15

_SCHEMA = {
    "piece": pa.int32(),
    "row": pa.int64(),
    "digest": pa.binary(digests.DIGEST_BYTES),
    "unit": pa.binary(digests.DIGEST_BYTES),
    "stratum": pa.string(),
    "excerpt": pa.string(),
    "text_bytes": pa.int64(),
    "fate": pa.int8(),
    "scored_bytes": pa.int64(),
    "tokens": pa.int32(),
    "offset": pa.int64(),
    "content": pa.binary(digests.DIGEST_BYTES),
    "label": pa.string(),
    "start": pa.list_(pa.int32()),
    "length": pa.list_(pa.int32()),
    "targets": pa.list_(pa.int32()),
    "cut_field": pa.list_(pa.string()),
    "cut_tokens": pa.list_(pa.int32()),
    "unlearnt": pa.int32(),
}


class Writer:
    """Gathers the documents of one part of a unit: in memory 4 bytes a token, and about 2 KB a document."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int32]] = []
        self._masks: list[NDArray[np.bool_] | None] = []
        self._rows: list[tuple[Any, ...]] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._offset = 0

    def __len__(self) -> int:
        """Documents so far."""
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether it is time to write what there is."""
        return self._offset >= _PART_TOKENS or len(self) >= _PART_ROWS

    def add(self, records: Sequence[tuple[int, Record]], columns: Columns, task: Task) -> None:
        """Encodes records, each with the place of its piece in the unit, and adds them."""
        full = [record for _, record in records if not record.is_empty]
        examples = iter(task.encode([tuple(text or "" for text in record.text) for record in full]))
        contents = [_content(record, columns) for _, record in records]
        self._signatures.append(duplicates.signatures(contents))
        for (piece, record), content in zip(records, contents, strict=True):
            digest = digests.digest(content)
            unit = digest if record.group is None else digests.digest(b"group " + record.group.encode())
            place = (piece, record.row, digest, unit, record.stratum or "", _excerpt(content), len(content))
            self._rows.append(place + (self._empty(digest) if record.is_empty else self._encoded(next(examples))))

    def _empty(self, digest: bytes) -> tuple[Any, ...]:
        return FATES.index(EMPTY), 0, 0, self._offset, digest, None, [], [], [], [], [], 0

    def _encoded(self, example: Example) -> tuple[Any, ...]:
        parts = [example.ids.tobytes()]
        if example.supervised is not None:
            parts.append(example.supervised.tobytes())
        if example.label is not None:
            parts.append(b"label " + example.label.encode())
        whole = len(example.ids) + sum(tokens for _, tokens in example.cut) - (example.label is not None)
        offset = self._offset
        self._offset += len(example.ids)
        self._ids.append(example.ids)
        self._masks.append(example.supervised)
        return (
            FATES.index(example.fate),
            example.scored_bytes,
            whole,
            offset,
            digests.digest(b"".join(parts)),
            example.label,
            [start for start, _ in example.spans],
            [length for _, length in example.spans],
            [_targets(example.supervised, *span) for span in example.spans],
            [field for field, _ in example.cut],
            [tokens for _, tokens in example.cut],
            example.unlearnt,
        )

    def tokens(self) -> dict[str, pa.Array]:
        """The token ids of all documents end to end, and which are targets, where any example tells."""
        none = np.zeros(0, dtype=np.int32)
        result = {"ids": pa.array(np.concatenate([none, *self._ids]))}
        if any(mask is not None for mask in self._masks):
            masks = [
                np.ones(len(ids), dtype=np.uint8) if mask is None else mask.astype(np.uint8)
                for ids, mask in zip(self._ids, self._masks, strict=True)
            ]
            result["supervised"] = pa.array(np.concatenate(masks))
        return result

    def columns(self) -> dict[str, pa.Array]:
        """The index as columns, those of the signatures and their bands among them."""
        values = list(zip(*self._rows, strict=True)) or [()] * len(_SCHEMA)
        result = {name: pa.array(column, type_) for (name, type_), column in zip(_SCHEMA.items(), values, strict=True)}
        signatures = np.concatenate([duplicates.signatures([]), *self._signatures])
        result |= zip(duplicates.BANDS, map(pa.array, duplicates.bands(signatures)), strict=True)
        type_ = pa.binary(4 * duplicates.SIGNATURE_WORDS)
        result["signature"] = pa.Array.from_buffers(type_, len(signatures), [None, pa.py_buffer(signatures)])
        return result


def _content(record: Record, columns: Columns) -> bytes:
    """The record's text without its label: the same text is the same document, whatever it is called."""
    named = zip(columns.task, record.text, strict=True)
    return "\0".join(value or "" for column, value in named if column.kind != "label").encode()


def _excerpt(content: bytes) -> str:
    return " ".join(content[: 4 * _EXCERPT].decode(errors="ignore").replace("\0", " ").split())[:_EXCERPT]


def _targets(supervised: NDArray[np.bool_] | None, start: int, length: int) -> int:
    return length - 1 if supervised is None else int(supervised[start + 1 : start + length].sum())


@dataclass(frozen=True)
class Spans:
    """The segments cut from the documents, those of each document together.

    Attributes:
        counts: int32 (documents,), segments of each document.
        start: int32 (S,), first token of each segment.
        length: int32 (S,), its tokens.
        targets: int32 (S,), how many of them are targets.
    """

    counts: NDArray[np.int32]
    start: NDArray[np.int32]
    length: NDArray[np.int32]
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class Index:
    """The indexes of all parts of all units, in order.

    Attributes:
        paths: Their files.
        begins: int64 (parts + 1,), the number of the first document of each, and of all.
    """

    paths: tuple[Path, ...]
    begins: NDArray[np.int64]

    @classmethod
    def open(cls, paths: Sequence[Path], rows: Sequence[int]) -> Index:
        """The index of parts of so many documents each."""
        return cls(tuple(paths), ragged.begins(np.array(rows)))

    def __len__(self) -> int:
        """Documents."""
        return int(self.begins[-1])

    def _batches(self) -> Iterator[tuple[slice, pa.RecordBatch]]:
        for path, begin, end in zip(self.paths, self.begins[:-1].tolist(), self.begins[1:].tolist(), strict=True):
            yield slice(begin, end), store.map_arrow(path)

    def numbers(self, name: str, dtype: Any) -> NDArray[Any]:
        """A column of numbers, (documents,)."""
        result = np.empty(len(self), dtype=dtype)
        for place, batch in self._batches():
            result[place] = batch[name].to_numpy()
        return result

    def digests(self, name: str) -> NDArray[np.uint64]:
        """A column of digests, uint64 (documents, 2)."""
        result = np.empty((len(self), 2), dtype=np.uint64)
        for place, batch in self._batches():
            result[place] = digests.array(batch[name].buffers()[1] or b"")
        return result

    def codes(self, name: str) -> tuple[NDArray[np.int32], list[str]]:
        """A column of few texts: for each document its text's place among them, -1 for none; and the texts, sorted."""
        result = np.empty(len(self), dtype=np.int32)
        known: dict[str, int] = {}
        for place, batch in self._batches():
            encoded = batch[name].dictionary_encode()
            table = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
            codes = encoded.indices.fill_null(-1).to_numpy()
            result[place] = np.array([*table, -1], dtype=np.int32)[codes]
        texts = sorted(known)
        ranks = {text: rank for rank, text in enumerate(texts)}
        return np.array([*(ranks[text] for text in known), -1], dtype=np.int32)[result], texts

    def counts(self, name: str) -> NDArray[np.int32]:
        """Entries of each document in a column of lists, int32 (documents,)."""
        result = np.empty(len(self), dtype=np.int32)
        for place, batch in self._batches():
            result[place] = np.diff(batch[name].offsets.to_numpy())
        return result

    def text(self, name: str, document: int) -> str:
        """One document's value of a column of texts."""
        part = int(np.searchsorted(self.begins, document, side="right")) - 1
        value: str = store.map_arrow(self.paths[part])[name][document - int(self.begins[part])].as_py()
        return value

    def signatures(self, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        """MinHash signatures of documents, in ascending order: uint32 (len(documents), SIGNATURE_WORDS)."""
        result = np.empty((len(documents), duplicates.SIGNATURE_WORDS), dtype=np.uint32)
        ends = np.searchsorted(documents, self.begins)
        for part in np.flatnonzero(np.diff(ends)).tolist():
            place = slice(ends[part], ends[part + 1])
            raw = store.map_arrow(self.paths[part])["signature"].buffers()[1]
            signatures = np.frombuffer(raw, np.uint32).reshape(-1, duplicates.SIGNATURE_WORDS)
            result[place] = signatures[documents[place] - self.begins[part]]
        return result

    def spans(self) -> Spans:
        """The segments of all documents."""
        flat: dict[str, list[NDArray[np.int32]]] = {name: [] for name in ("start", "length", "targets")}
        for _, batch in self._batches():
            for name, parts in flat.items():
                parts.append(batch[name].values.to_numpy().copy())
        return Spans(self.counts("start"), **{name: np.concatenate(parts) for name, parts in flat.items()})

    def cut(self, used: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
        """By field, the used documents that it was cut in, and the tokens cut off."""
        result: dict[str, dict[str, int]] = {}
        for place, batch in self._batches():
            document = np.repeat(used[place], np.diff(batch["cut_field"].offsets.to_numpy()))
            named = zip(batch["cut_field"].values.to_pylist(), batch["cut_tokens"].values.to_pylist(), strict=True)
            for is_used, (field, tokens) in zip(document.tolist(), named, strict=True):
                if is_used:
                    entry = result.setdefault(field, {"documents": 0, "tokens": 0})
                    entry["documents"] += 1
                    entry["tokens"] += tokens
        return dict(sorted(result.items()))

"""The files of a checkpoint's weights and optimizer state: pieces of parameters, read by name and range.

A file is safetensors (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, the
header in JSON, and the tensors one after the other. It is written here, straight out of the snapshot, since
safetensors' own writer first makes a copy of everything; and read here by plain reads of the bytes wanted, since pages
of a mapped file count as this process's memory. Each tensor is named ``KIND/PARAMETER``; the metadata says of each
parameter its shape and where in it the file's piece begins.
"""

from __future__ import annotations

import json
import math
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distft.engine import KINDS, Snapshot
from distft.errors import CheckpointError

FORMAT = "distft-shard-1"
DTYPES = {"F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def content(snapshot: Snapshot) -> Iterator[memoryview]:
    """A snapshot as a file's bytes, buffer by buffer, without a copy of the whole."""
    yield memoryview(_header(snapshot))
    for part in snapshot.stream():
        yield _bytes(part.contiguous())


def file_bytes(snapshot: Snapshot) -> int:
    """Exactly how many bytes :func:`content` has."""
    return len(_header(snapshot)) + snapshot.bytes


def _header(snapshot: Snapshot) -> bytes:
    pieces = {piece.name: {"start": piece.start, "shape": piece.shape} for piece in snapshot.pieces}
    metadata = {"format": FORMAT, "updates": str(snapshot.updates), "pieces": json.dumps(pieces)}
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for piece in snapshot.pieces:
        header[f"{piece.kind}/{piece.name}"] = {
            "dtype": NAMES[piece.tensor.dtype],
            "shape": [piece.tensor.numel()],
            "data_offsets": [position, position + piece.tensor.nbytes],
        }
        position += piece.tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, (bytes,)."""
    return memoryview(tensor.numpy().view(np.uint8).data)


@dataclass(frozen=True, order=True)
class _Run:
    """Elements ``start`` to ``stop`` of something, and where in which file their bytes are."""

    start: int
    stop: int
    path: Path
    position: int
    dtype: torch.dtype


class Shards:
    """A checkpoint's state, whoever wrote it; a :class:`~distft.engine.StateReader`.

    Only headers are read when it is made, and then only what is asked for.

    Args:
        files: All files of one checkpoint.

    Raises:
        CheckpointError: A header cannot be read, or is not one of ours; the file is named.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.updates = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where = ", ".join(sorted({str(path.parent) for path in files}))
        self._runs: dict[tuple[str, str], list[_Run]] = {}
        for path in files:
            try:
                self._add(path)
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                raise CheckpointError(f"the header cannot be read ({error!r})", where=str(path)) from error
        for runs in self._runs.values():
            runs.sort()

    def _add(self, path: Path) -> None:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}, and this version reads {FORMAT}")
        self.updates = max(self.updates, int(metadata["updates"]))
        for name, piece in json.loads(metadata["pieces"]).items():
            self.shapes[name] = tuple(piece["shape"])
            for kind in KINDS:
                entry = header[f"{kind}/{name}"]
                start, position = piece["start"], 8 + length + entry["data_offsets"][0]
                run = _Run(start, start + entry["shape"][0], path, position, DTYPES[entry["dtype"]])
                self._runs.setdefault((name, kind), []).append(run)

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened parameter's ``weight``, ``exp_avg`` or ``exp_avg_sq``.

        Raises:
            CheckpointError: No file has all of them, or one cannot be read; parameter and file are named.
        """
        runs = self._runs.get((name, kind), [])
        place = max(0, bisect_right(runs, start, key=lambda run: run.start) - 1)
        parts, reached = [], start
        while reached < stop and place < len(runs) and runs[place].start <= reached < runs[place].stop:
            run, end = runs[place], min(stop, runs[place].stop)
            parts.append(_read(run, name, reached, end))
            reached, place = end, place + 1
        if reached < stop:
            raise CheckpointError(
                f"the {kind} of {name} lacks elements {reached:,} to {stop:,}",
                where=self._where,
                fix="was the model or its adapter changed since the checkpoint was written?",
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def _read(run: _Run, name: str, start: int, stop: int) -> Tensor:
    """Reads a part of a run."""
    tensor = torch.empty(stop - start, dtype=run.dtype)
    wanted = _bytes(tensor)
    try:
        with run.path.open("rb", buffering=0) as file:
            file.seek(run.position + (start - run.start) * run.dtype.itemsize)
            done = 0
            while done < len(wanted):  # a read is of 2 GiB at most
                count = file.readinto(wanted[done:])
                if not count:
                    raise CheckpointError(f"it ends within {name}", where=str(run.path))
                done += count
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error})", where=str(run.path)) from error
    return tensor


def weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The trained weights of a checkpoint, whole and in fp32, by their names in the model.

    A tied weight has its first name only; beside an adapter the frozen ones are not among them.

    Raises:
        CheckpointError: Something is missing or cannot be read.
    """
    state = Shards(files)
    return {
        name: state.read(name, "weight", 0, math.prod(shape)).float().view(shape)
        for name, shape in state.shapes.items()
    }

"""The sizes that a GGUF file's header tells, without its weights and without its vocabulary: some milliseconds.

The ``gguf`` package's reader makes a Python object of each of a vocabulary's 50,000 tokens, which takes two seconds.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from distft.errors import DataError

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What a GGUF file says of itself.

    Returns:
        Its settings by name, those that are lists left out; and the shape of each tensor, rows first as torch has it.

    Raises:
        DataError: It is no GGUF file, or cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(data)
        except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
            raise DataError(
                f"its header cannot be read ({error})", where=str(path), fix="fetch it again, or name another file"
            ) from None


def _read(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    magic, version, tensors, settings = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("no GGUF of version 2 or 3")
    at, said = 24, {}
    for _ in range(settings):
        name, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _value(data, at + 4, kind)
        if value is not None:
            said[name] = value
    shapes = {}
    for _ in range(tensors):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        shapes[name] = tuple(reversed(struct.unpack_from(f"<{dimensions}Q", data, at + 4)))
        at += 4 + 8 * dimensions + 4 + 8  # then its type and its place
    return said, shapes


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A setting's value, None for a list, and where the next thing begins."""
    if kind == _STRING:
        return _string(data, at)
    if kind == _ARRAY:
        return None, _after_array(data, at)
    code = f"<{_SCALARS[kind]}"
    return struct.unpack_from(code, data, at)[0], at + struct.calcsize(code)


def _after_array(data: mmap.mmap, at: int) -> int:
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _SCALARS:
        return int(at + count * struct.calcsize(f"<{_SCALARS[kind]}"))
    for _ in range(count):
        if kind == _ARRAY:
            at = _after_array(data, at)
        else:
            at += 8 + struct.unpack_from("<Q", data, at)[0]
    return int(at)

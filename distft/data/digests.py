"""Digests of 16 bytes by the million: as arrays, without an object for each.

An array of digests is uint64 (N, 2), each half read big-endian, so that numbers sort as the bytes do.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
_CHUNK = 1 << 16


def digest(content: bytes) -> bytes:
    """The digest of what a document holds (BLAKE2b, 16 bytes)."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def array(content: bytes | memoryview) -> NDArray[np.uint64]:
    """Digests that lie end to end, as an array (N, 2)."""
    return np.frombuffer(content, ">u8").astype(np.uint64).reshape(-1, 2)


def content(digests: NDArray[np.uint64]) -> bytes:
    """The bytes of an array of digests, end to end."""
    return digests.astype(">u8").tobytes()


def order(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The places of the digests from the smallest to the largest; equal ones keep their order."""
    return np.lexsort((digests[:, 1], digests[:, 0]))


def distinct(digests: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """The distinct digests in their order, (D, 2), and for each of all the place of its own among them, int32 (N,)."""
    places = order(digests)
    ordered = digests[places]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(ordered), dtype=np.int32)
    numbers[places] = np.cumsum(new, dtype=np.int32) - 1
    return ordered[new], numbers


def drawn(digests: NDArray[np.uint64], key: str) -> NDArray[np.int64]:
    """The places of the digests in an order drawn by ``key``: that of their keyed hashes, then of themselves."""
    hashes = np.empty_like(digests)
    for start in range(0, len(digests), _CHUNK):
        plain = content(digests[start : start + _CHUNK])
        hashed = b"".join(
            hashlib.blake2b(plain[first : first + DIGEST_BYTES], key=key.encode(), digest_size=DIGEST_BYTES).digest()
            for first in range(0, len(plain), DIGEST_BYTES)
        )
        hashes[start : start + _CHUNK] = array(hashed)
    return np.lexsort((digests[:, 1], digests[:, 0], hashes[:, 1], hashes[:, 0]))

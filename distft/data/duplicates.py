"""The same text twice: exact copies by digest, near copies by MinHash, within and across splits.

Shingles are runs of five words. A word ends at ASCII white space and is compared without ASCII case; each character
from U+3000 on (scripts written without spaces) is a word of its own. Signatures are those of datasketch's "affine32"
scheme, computed in bulk; candidates share a band of the signature (A. Broder, "On the resemblance and containment of
documents", 1997; P. Indyk and R. Motwani, "Approximate nearest neighbors", STOC 1998). Work grows linearly with text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNATURE_WORDS = 128
THRESHOLD = 0.8  # estimated Jaccard similarity of the shingles
_BANDS = 16  # with 8 words a band: a pair of similarity 0.8 is found with probability 0.95, of 0.9 with 0.9999
_SHINGLE = 5
_CHUNK = 2048
_PER_BUCKET = 64
_LISTED = 100

_rng = np.random.Generator(np.random.PCG64(1))
_A = _rng.integers(0, 1 << 31, (SIGNATURE_WORDS, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_B = _rng.integers(0, 1 << 32, (SIGNATURE_WORDS, 1), dtype=np.uint32)
_LETTERS = _rng.integers(0, 1 << 32, 256, dtype=np.uint32)
_LETTERS[ord("A") : ord("Z") + 1] = _LETTERS[ord("a") : ord("z") + 1]
_SPACE = np.zeros(256, dtype=bool)
_SPACE[list(b" \t\n\r\v\f")] = True


@dataclass(frozen=True)
class Leak:
    """Two documents of different splits that are the same, or nearly.

    Attributes:
        first: Document number, in the split that comes first in ``SPLITS``.
        second: Document number.
        similarity: Estimated Jaccard similarity of their shingles; 1 for exact copies.
    """

    first: int
    second: int
    similarity: float


@dataclass(frozen=True)
class Leaks:
    """What was found across splits.

    Attributes:
        documents: Documents of the validation and test split that have a copy in another split.
        pairs: Pairs found; at most 64 for one document and band, so a lower bound where a text is very common.
        listed: The most similar pairs, 100 at most.
    """

    documents: int
    pairs: int
    listed: tuple[Leak, ...]


def signatures(texts: Sequence[bytes]) -> NDArray[np.uint32]:
    """MinHash signatures of UTF-8 texts, uint32 (texts, SIGNATURE_WORDS), computed together: texts may be short.

    Shingles that begin in the last words of a text reach into words that stand for its end; a text of fewer than five
    words has one.
    """
    result = np.full((len(texts), SIGNATURE_WORDS), 0xFFFFFFFF, dtype=np.uint32)
    words, text_of_word = _words(texts)
    counts = np.bincount(text_of_word, minlength=len(texts))
    padded = np.zeros(len(words) + (_SHINGLE - 1) * len(texts), dtype=np.uint32)
    padded[np.arange(len(words)) + (_SHINGLE - 1) * text_of_word] = words
    kept = np.maximum(counts - _SHINGLE + 1, 1)
    text_of_shingle = np.repeat(np.arange(len(texts)), kept)
    firsts = np.cumsum(counts + _SHINGLE - 1) - (counts + _SHINGLE - 1)
    within = np.arange(len(text_of_shingle)) - np.repeat(np.cumsum(kept) - kept, kept)
    shingles = _shingles(padded)[firsts[text_of_shingle] + within]

    buffer = np.empty((SIGNATURE_WORDS, min(len(shingles), _CHUNK)), dtype=np.uint32)
    for start in range(0, len(shingles), _CHUNK):
        chunk = shingles[start : start + _CHUNK]
        permuted = np.multiply(_A, chunk, out=buffer[:, : len(chunk)])
        permuted += _B
        present, begins = np.unique(text_of_shingle[start : start + _CHUNK], return_index=True)
        smallest = np.minimum.reduceat(permuted, begins, axis=1) if len(present) > 1 else permuted.min(1, keepdims=True)
        result[present] = np.minimum(result[present], smallest.T)
    return result


def _words(texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """A hash of each word, uint32 (words,), and the text it is of."""
    letters = np.frombuffer(b" ".join(texts), dtype=np.uint8)
    space = _SPACE[letters]
    begins = letters >= 0xE3
    begins[1:] |= space[:-1]
    begins[:1] = True
    begins &= ~space
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, dtype=np.uint32), starts
    ends = np.cumsum([len(text) + 1 for text in texts])
    text_of_word = np.searchsorted(ends, starts, side="right")
    first = int(starts[0])
    starts = (starts - first).astype(np.uint32)
    letters, space = letters[first:], space[first:]
    mixed = np.arange(len(letters), dtype=np.uint32)  # a letter's place in its word
    mixed -= np.repeat(starts, np.diff(starts, append=np.uint32(len(letters))))
    mixed *= np.uint32(0x9E3779B1)
    mixed ^= _LETTERS[letters]
    mixed *= np.uint32(0x85EBCA6B)
    mixed[space] = 0
    return np.add.reduceat(mixed, starts, dtype=np.uint32), text_of_word


def _shingles(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A hash of every five words in a row, uint32 (words - 4,)."""
    count = max(len(words) - _SHINGLE + 1, 0)
    result = np.zeros(count, dtype=np.uint32)
    for offset in range(_SHINGLE):
        result = (result ^ words[offset : offset + count]) * np.uint32(0x9E3779B1)
        result ^= result >> np.uint32(15)
    result = (result ^ (result >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    result = (result ^ (result >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return result ^ (result >> np.uint32(16))


def copies_within(digests: Sequence[bytes], splits: NDArray[np.int8], split: int) -> int:
    """How many documents of a split repeat an earlier one of it exactly."""
    chosen = [digests[document] for document in np.flatnonzero(splits == split).tolist()]
    return len(chosen) - len(set(chosen))


def exact(digests: Sequence[bytes], splits: NDArray[np.int8]) -> Leaks:
    """Exact copies across splits.

    Args:
        digests: Digest of each document's text.
        splits: Split of each document, -1 for none.
    """
    by_digest: dict[bytes, list[int]] = {}
    for document in np.flatnonzero(splits >= 0).tolist():
        by_digest.setdefault(digests[document], []).append(document)
    shared = [group for group in by_digest.values() if len({int(splits[document]) for document in group}) > 1]
    leaks = {}
    for group in shared:
        for first, second in _pairs(group, splits, range(len(group))):
            leaks[first, second] = 1.0
    return _leaks(leaks, splits)


def near(signatures: NDArray[np.uint32], digests: Sequence[bytes], splits: NDArray[np.int8]) -> Leaks:
    """Near copies across splits, exact ones left out.

    Args:
        signatures: uint32 (documents, SIGNATURE_WORDS).
        digests: Digest of each document's text.
        splits: Split of each document, -1 for none.
    """
    ranks = {document: rank for rank, document in enumerate(sorted(range(len(digests)), key=digests.__getitem__))}
    found: dict[tuple[int, int], float] = {}
    for bucket in _buckets(signatures, splits):
        for first, second in _pairs(bucket, splits, [ranks[document] for document in bucket]):
            if (first, second) in found or digests[first] == digests[second]:
                continue
            similarity = float((signatures[first] == signatures[second]).mean())
            if similarity >= THRESHOLD:
                found[first, second] = similarity
    return _leaks(found, splits)


def _buckets(signatures: NDArray[np.uint32], splits: NDArray[np.int8]) -> Iterator[list[int]]:
    """Documents that agree in a band of their signature and are not all of one split."""
    used = np.flatnonzero(splits >= 0)
    if len(np.unique(splits[used])) < 2:
        return
    for band in np.split(signatures[used], _BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * 4))).ravel()
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(np.concatenate((keys[order][1:] != keys[order][:-1], [True]))) + 1
        for start, end in zip(np.concatenate(([0], ends[:-1])), ends, strict=True):
            if end - start > 1:
                bucket = used[order[start:end]]
                if len(np.unique(splits[bucket])) > 1:
                    yield bucket.tolist()


def _pairs(bucket: Sequence[int], splits: NDArray[np.int8], ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of different splits, the earlier split first; each held-out document meets 64 others at most."""
    by_rank = [document for _, document in sorted(zip(ranks, bucket, strict=True))]
    by_split = {
        split: [one for one in by_rank if splits[one] == split] for split in sorted({*splits[by_rank].tolist()})
    }
    for second_split, seconds in by_split.items():
        for first_split, firsts in by_split.items():
            if first_split < second_split:
                for second in seconds:
                    for first in firsts[:_PER_BUCKET]:
                        yield first, second


def _leaks(found: dict[tuple[int, int], float], splits: NDArray[np.int8]) -> Leaks:
    held_out = {document for pair in found for document in pair if splits[document] > 0}
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_LISTED]
    return Leaks(len(held_out), len(found), tuple(Leak(first, second, value) for (first, second), value in ordered))

"""The same text twice: exact copies by digest, near copies by MinHash, within and across splits.

Shingles are runs of five words. A word ends at ASCII white space and is compared without ASCII case; each character
from U+3000 on (scripts written without spaces) is a word of its own. Signatures are those of datasketch's "affine32"
scheme, computed in bulk; candidates share a band of the signature (A. Broder, "On the resemblance and containment of
documents", 1997; P. Indyk and R. Motwani, "Approximate nearest neighbors", STOC 1998). Work grows linearly with text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray

from distft.data import digests, ragged
from distft.data.splits import SPLITS

SIGNATURE_WORDS = 128
THRESHOLD = 0.8  # estimated Jaccard similarity of the shingles
_BANDS = 16  # with 8 words a band: a pair of similarity 0.8 is found with probability 0.95, of 0.9 with 0.9999
BANDS = tuple(f"band-{band}" for band in range(_BANDS))
"""Names of the columns of keys, one for each band."""
_SHINGLE = 5
_CHUNK = 2048
_PER_BUCKET = 16
_LISTED = 100
_SCORED = 1 << 14
_CROSSINGS = tuple(combinations(range(len(SPLITS)), 2))

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
        pairs: Pairs found; each document meets at most 16 of another split for one text or band, so this is a
            lower bound where a text is very common.
        listed: The most similar pairs, 100 at most.
    """

    documents: int
    pairs: int
    listed: tuple[Leak, ...]


def signatures(texts: Sequence[bytes]) -> NDArray[np.uint32]:
    """MinHash signatures of UTF-8 texts, uint32 (texts, SIGNATURE_WORDS), computed together: texts may be short.

    Shingles that begin in the last words of a text reach into words that stand for its end; a text of fewer than five
    words has one, and a blank text none.
    """
    result = np.full((len(texts), SIGNATURE_WORDS), 0xFFFFFFFF, dtype=np.uint32)
    words, text_of_word = _words(texts)
    counts = np.bincount(text_of_word, minlength=len(texts))
    padded = np.zeros(len(words) + (_SHINGLE - 1) * len(texts), dtype=np.uint32)
    padded[np.arange(len(words)) + (_SHINGLE - 1) * text_of_word] = words
    kept = np.where(counts, np.maximum(counts - _SHINGLE + 1, 1), 0)
    text_of_shingle = np.repeat(np.arange(len(texts)), kept)
    shingles = _shingles(padded)[ragged.ranges(ragged.begins(counts + _SHINGLE - 1)[:-1], kept)]

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


def bands(signatures: NDArray[np.uint32]) -> list[NDArray[np.uint64]]:
    """For each band a key of its words, uint64 (texts,): texts that agree in a band have the same key."""
    result = []
    for band in np.split(signatures, _BANDS, axis=1):
        keys = np.zeros(len(band), dtype=np.uint64)
        for word in band.T:
            keys = (keys ^ word) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        result.append(keys)
    return result


def copies_within(texts: NDArray[np.uint64], splits: NDArray[np.int8], split: int) -> int:
    """How many documents of a split repeat an earlier one of it exactly; ``texts`` as for :func:`exact`."""
    chosen = texts[splits == split]
    return len(chosen) - len(digests.distinct(chosen)[0])


def exact(texts: NDArray[np.uint64], splits: NDArray[np.int8]) -> Leaks:
    """Exact copies across splits.

    Args:
        texts: Digest of each document's text, uint64 (documents, 2).
        splits: Split of each document, -1 for none.
    """
    used = np.flatnonzero(splits >= 0)
    found, numbers = digests.distinct(texts[used])
    counts = _counts(numbers, splits[used], len(found))
    shared = (counts > 0).sum(axis=1) > 1
    pairs = sum(
        int((np.minimum(counts[shared, first], _PER_BUCKET) * counts[shared, second]).sum())
        for first, second in _CROSSINGS
    )
    held_out = np.flatnonzero(shared[numbers] & (splits[used] > 0))
    groups = dict.fromkeys(numbers[held_out[:_LISTED]].tolist())
    found_pairs = (pair for group in groups for pair in _of_group(used[numbers == group], splits))
    listed = tuple(Leak(first, second, 1.0) for first, second in islice(found_pairs, _LISTED))
    return Leaks(len(held_out), pairs, listed)


def _of_group(group: NDArray[np.int64], splits: NDArray[np.int8]) -> Iterator[tuple[int, int]]:
    for earlier, later in _CROSSINGS:
        firsts, seconds = (group[splits[group] == split][:_LISTED].tolist() for split in (earlier, later))
        yield from ((first, second) for first in firsts[:_PER_BUCKET] for second in seconds)


def near(
    keys: Iterable[NDArray[np.uint64]],
    signatures_of: Callable[[NDArray[np.int64]], NDArray[np.uint32]],
    texts: NDArray[np.uint64],
    splits: NDArray[np.int8],
) -> Leaks:
    """Near copies across splits, exact ones left out. Holds one band and the pairs found in memory.

    Args:
        keys: For each band the key of each document, as :func:`bands` gives them.
        signatures_of: The signatures of documents, given in ascending order.
        texts: Digest of each document's text, uint64 (documents, 2).
        splits: Split of each document, -1 for none.
    """
    used = np.flatnonzero(splits >= 0).astype(np.int32)
    pairs, similarities = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.float32)
    if len(np.unique(splits[used])) > 1:
        ranks = digests.distinct(texts[used])[1]
        for band in keys:
            met = [
                used[first].astype(np.uint64) << np.uint64(32) | used[second].astype(np.uint64)
                for first, second in _meetings(band[used], splits[used], ranks)
            ]
            new = np.setdiff1d(np.concatenate(met), pairs)
            for start in range(0, len(new), _SCORED):
                chunk = new[start : start + _SCORED]
                similar = _similarities(chunk, signatures_of, texts)
                pairs = np.concatenate((pairs, chunk[similar >= THRESHOLD]))
                similarities = np.concatenate((similarities, similar[similar >= THRESHOLD]))
    held_out = np.unique(np.concatenate(_ends(pairs)))
    best = np.lexsort((pairs, -similarities))[:_LISTED]
    ends = zip(*_ends(pairs[best]), similarities[best], strict=True)
    return Leaks(
        int((splits[held_out] > 0).sum()),
        len(pairs),
        tuple(Leak(int(first), int(second), float(similarity)) for first, second, similarity in ends),
    )


def _ends(pairs: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _similarities(
    pairs: NDArray[np.uint64],
    signatures_of: Callable[[NDArray[np.int64]], NDArray[np.uint32]],
    texts: NDArray[np.uint64],
) -> NDArray[np.float32]:
    """Estimated similarity of each pair, float32 (pairs,); 0 for exact copies."""
    first, second = _ends(pairs)
    documents, places = np.unique(np.concatenate((first, second)), return_inverse=True)
    signatures = signatures_of(documents)
    equal = signatures[places[: len(pairs)]] == signatures[places[len(pairs) :]]
    similar: NDArray[np.float32] = equal.mean(axis=1, dtype=np.float32)
    similar[(texts[first] == texts[second]).all(axis=1)] = 0
    return similar


def _meetings(
    keys: NDArray[np.uint64], splits: NDArray[np.int8], ranks: NDArray[np.int32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Documents of different splits with the same key, the earlier split first, as two arrays of places.

    Each document meets those of the other split that come first by ``ranks``, which is an order of their text.
    """
    order = np.argsort(keys)
    begins = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    if len(begins):
        mixed = np.minimum.reduceat(splits[order], begins) < np.maximum.reduceat(splits[order], begins)
        order = order[np.repeat(mixed, np.diff(begins, append=len(order)))]
    order = order[np.lexsort((ranks[order], splits[order], keys[order]))]
    first = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
    bucket = np.cumsum(first, dtype=np.int32) - 1
    counts = _counts(bucket, splits[order], int(first.sum()))
    runs = ragged.begins(counts.ravel())[:-1].reshape(counts.shape)  # where those of a bucket and split begin
    for earlier, later in _CROSSINGS:
        seconds = np.flatnonzero(splits[order] == later)
        met = np.minimum(counts[bucket[seconds], earlier], _PER_BUCKET)
        yield order[ragged.ranges(runs[bucket[seconds], earlier], met)], order[np.repeat(seconds, met)]


def _counts(groups: NDArray[np.int32], splits: NDArray[np.int8], number: int) -> NDArray[np.int64]:
    """Documents of each group in each split, int64 (number, splits)."""
    places = groups.astype(np.int64) * len(SPLITS) + splits
    return np.bincount(places, minlength=number * len(SPLITS)).reshape(number, len(SPLITS))

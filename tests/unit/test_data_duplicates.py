"""Copies: exact ones by digest, near ones by MinHash, with datasketch and true Jaccard similarity as references."""

from __future__ import annotations

import random

import numpy as np
import pytest
from datasketch import MinHash

from distft.data import digests, duplicates
from distft.data.duplicates import exact, near, signatures

WORDS = [f"word{number}" for number in range(3000)]


def article(seed: int, words: int = 400) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def changed(words: list[str], share: float, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(WORDS) if draw.random() < share else word for word in words]


def jaccard(one: list[str], two: list[str]) -> float:
    shingles = [{tuple(text[start : start + 5]) for start in range(len(text) - 4)} for text in (one, two)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def signature(text: bytes) -> np.ndarray:
    signed: np.ndarray = signatures([text])[0]
    return signed


def sign(words: list[str]) -> np.ndarray:
    return signature(" ".join(words).encode())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.1, 0.5])
def test_signatures_estimate_the_similarity_of_shingles_as_datasketch_does(share: float) -> None:
    errors, reference_errors = [], []
    for seed in range(12):
        one = article(seed)
        two = changed(one, share, seed)
        true = jaccard(one, two)
        errors.append(float((sign(one) == sign(two)).mean()) - true)
        sketches = [MinHash(duplicates.SIGNATURE_WORDS) for _ in range(2)]
        for sketch, text in zip(sketches, (one, two), strict=True):
            sketch.update_batch([" ".join(text[start : start + 5]).encode() for start in range(len(text) - 4)])
        reference_errors.append(sketches[0].jaccard(sketches[1]) - true)
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 2 * np.std(reference_errors) + 0.01


def test_case_and_white_space_do_not_matter_words_do() -> None:
    words = article(1)
    assert (sign(words) == signature(("\n ".join(words).upper() + " \r\n").encode())).all()
    assert (sign(words) == sign(article(2))).mean() < 0.05
    assert (sign(["one", "two"]) != sign(["two", "one"])).any()
    assert (
        signature("我们今天开始一个新的工作、明天继续。".encode())
        == signature("我们今天开始一个新的工作、后天继续。".encode())
    ).mean() > 0.4


def test_texts_are_signed_together_as_alone() -> None:
    lengths = (1, 400, 4, 20_000, 5, 6, 3, 2048, 2052, 1)
    texts = [" ".join(article(seed, words)).encode() for seed, words in enumerate(lengths)]
    texts += [b" \n lead and trail \n", "\u4eca\u5929".encode(), b"", b" ", texts[1]]
    together = signatures(texts)
    assert together.tolist() == [signature(text).tolist() for text in texts]
    assert (together[1] == together[-1]).all()
    assert signatures([]).shape == (0, duplicates.SIGNATURE_WORDS)


def test_a_signature_is_the_smallest_of_each_permutation() -> None:
    words, _ = duplicates._words([" ".join(article(3, 20_000)).encode()])
    shingles = duplicates._shingles(words)
    assert len(shingles) == 20_000 - 4
    assert (sign(article(3, 20_000)) == (duplicates._A * shingles + duplicates._B).min(axis=1)).all()


def found(texts: list[list[str]], splits: list[int]) -> duplicates.Leaks:
    named = digests.array(b"".join(digests.digest(" ".join(text).encode()) for text in texts))
    signed = np.stack([sign(text) for text in texts])
    return near(duplicates.bands(signed), signed.__getitem__, named, np.array(splits, dtype=np.int8))


def test_near_copies_across_splits_are_found_and_only_those() -> None:
    one, two = article(1), article(2)
    texts = [one, changed(one, 0.01), two, changed(two, 0.01), changed(one, 0.3), one, article(3)]
    leaks = found(texts, [0, 2, 0, 0, 2, 2, 1])
    assert [(leak.first, leak.second) for leak in leaks.listed] == [(0, 1)]  # 2-3: one split; 0-5: exact; 4: too far
    assert leaks.documents == 1
    assert leaks.listed[0].similarity >= 0.8
    assert found(texts, [0, 0, 0, 0, 0, 0, 0]).pairs == 0
    assert found(texts, [0, -1, 0, 0, 2, -1, 1]).pairs == 0


def test_most_pairs_above_the_threshold_are_found() -> None:
    texts = [text for seed in range(60) for text in (article(seed), changed(article(seed), 0.015, seed))]
    similar = sum(jaccard(texts[place], texts[place + 1]) > 0.87 for place in range(0, 120, 2))
    assert similar > 20
    assert found(texts, [0, 1] * 60).documents >= 0.95 * similar


def test_a_text_repeated_everywhere_costs_no_more_than_linear_work() -> None:
    boilerplate = article(1, 60)
    texts = [[*boilerplate, f"end{number}"] for number in range(600)]
    leaks = found(texts, [number % 3 for number in range(600)])
    assert leaks.documents == 400
    assert 16 * 200 <= leaks.pairs <= 3 * 16 * 16 * 400
    assert len(leaks.listed) == 100


def test_exact_copies_are_counted_within_and_across() -> None:
    texts = digests.array(b"".join(digests.digest(letter.encode()) for letter in "aabaccbd"))
    splits = np.array([0, 0, 0, 2, 1, 1, 1, -1], dtype=np.int8)
    leaks = exact(texts, splits)
    assert [(leak.first, leak.second) for leak in leaks.listed] == [(0, 3), (1, 3), (2, 6)]
    assert leaks.documents == 2
    assert [duplicates.copies_within(texts, splits, split) for split in range(3)] == [1, 1, 0]


def test_listed_copies_are_few_where_there_are_many() -> None:
    texts = digests.array(b"".join(digests.digest(b"%d" % (number % 7)) for number in range(5000)))
    splits = (np.arange(5000) % 3).astype(np.int8)
    leaks = exact(texts, splits)
    assert leaks.documents == (splits > 0).sum()
    assert leaks.pairs == 3 * 16 * sum((splits == split).sum() for split in (1, 2, 2)) / 3
    assert len(leaks.listed) == 100

"""Classification: a text as the tokenizer gives it, and a place for its label."""

from __future__ import annotations

import pickle

import pytest

from distft.data.example import Column
from distft.task.classification import Classification
from tests.unit.tiny_models import SMOLLM2, tokenizer

TOKENIZER = tokenizer(**SMOLLM2)


def task(max_tokens: int = 100, overlong: str = "error") -> Classification:
    return Classification.from_tokenizer(
        TOKENIZER, max_tokens=max_tokens, overlong=overlong, text="body", label="topic"
    )


def test_only_the_label_is_a_target() -> None:
    examples = task().encode([("A text", "news"), ("B", "3")])
    for example, text, label in zip(examples, ("A text", "B"), ("news", "3"), strict=True):
        assert example.ids[:-1].tolist() == TOKENIZER(text)["input_ids"]
        assert example.supervised is not None
        assert example.supervised.tolist() == [False] * len(text) + [True]
        assert (example.label, example.fate, example.spans) == (label, "kept", ((0, len(text) + 1),))
        assert (example.scored_bytes, example.cut) == (0, ())
    assert task().columns == (Column("body"), Column("topic", "label"))


@pytest.mark.parametrize(("tokens", "fate"), [(10, "kept"), (11, "truncated")])
def test_what_is_too_long_keeps_its_beginning_and_its_label(tokens: int, fate: str) -> None:
    text = "0123456789ABC"[: tokens - 1]
    (example,) = task(10, "truncate").encode([(text, "news")])
    assert example.fate == fate
    assert TOKENIZER.decode(example.ids[:-1].tolist()) == text[:9]
    assert example.cut == ((("body", tokens - 10),) if fate == "truncated" else ())
    assert (example.label, example.spans) == ("news", ((0, 10),))
    assert example.supervised is not None
    assert example.supervised.tolist() == [False] * 9 + [True]


@pytest.mark.parametrize(("policy", "fate"), [("drop", "dropped"), ("error", "overlong")])
def test_what_is_too_long_is_left_out_whole(policy: str, fate: str) -> None:
    (example,) = task(10, policy).encode([("0123456789ABC", "news")])
    assert (example.fate, example.spans, example.cut, len(example.ids)) == (fate, (), (), 14)


def test_no_rows_and_pickling() -> None:
    assert task().encode([]) == []
    assert pickle.loads(pickle.dumps(task())) == task()

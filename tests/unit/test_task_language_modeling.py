"""Language modelling: which tokens, which targets, which bytes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from distft.task.encoder import Encoder, cut
from distft.task.language_modeling import LanguageModeling

END, BEGIN = "<|endoftext|>", "<|begin|>"
CORPUS = ["the cat sat on the mat, the dog sat on the cat", "naïve café: größe 日本語 🙂 the end of the day"] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_begin(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return tokenizer


def with_both_ends(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 1), (END, 0)]
    )
    return tokenizer


def trimming(tokenizer: Tokenizer) -> Tokenizer:
    """As GPT-2's: offsets leave out the space before a word."""
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def normalising(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama-2's: words, pieces with bytes to fall back on."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = [END, BEGIN, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, limit_alphabet=30, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return with_begin(tokenizer)


KINDS = {
    "byte level": byte_level(),
    "begin": with_begin(byte_level()),
    "both ends": with_both_ends(byte_level()),
    "trimming": trimming(byte_level()),
    "normalising": normalising(byte_level()),
    "metaspace": metaspace(),
}


def task(kind: str = "byte level", max_tokens: int = 1024, overlong: str = "error") -> LanguageModeling:
    return LanguageModeling(KINDS[kind].to_str(), 0, max_tokens, overlong)


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [("byte level", None, [0]), ("begin", 1, [0]), ("both ends", 1, [0]), ("metaspace", 1, [0])],
)
def test_a_document_begins_as_the_tokenizer_says_and_ends_once(kind: str, first: int | None, last: list[int]) -> None:
    (example,) = task(kind).encode([("the cat sat",)])
    ids = example.ids.tolist()
    assert (ids[0] == 1) == (first == 1)
    assert ids[-1:] == last
    assert ids.count(0) == 1
    assert ids.count(1) == (first == 1)
    assert example.ids.dtype == np.int32


def test_ids_are_those_of_the_tokenizer() -> None:
    texts = [(text,) for text in CORPUS]
    wanted = [[*KINDS["byte level"].encode(text).ids, 0] for text in CORPUS]
    assert [example.ids.tolist() for example in task().encode(texts)] == wanted


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_bytes_of_tokens_sum_to_the_text(kind: str, text: str) -> None:
    encoder = Encoder(KINDS[kind].to_str())
    ((ids, counted),) = encoder.encode([text])
    assert ids == encoder.tokenizer.encode(text).ids
    assert counted.sum() == len(text.encode()) or not ids
    assert len(counted) == len(ids)
    assert (counted >= 0).all()
    if ids[:1] == [1]:
        assert counted[0] == 0


@pytest.mark.parametrize("kind", ["byte level", "trimming", "begin"])
def test_bytes_of_a_byte_level_token_are_exact_where_offsets_are_not(kind: str) -> None:
    (example,) = task(kind).encode([(" the 🙂",)])
    first = 0 if kind == "begin" else len(KINDS[kind].decode([int(example.ids[0])]).encode())
    assert example.scored_bytes == len(" the 🙂".encode()) - first


def test_a_cut_within_a_character_is_counted_in_bytes() -> None:
    (example,) = task("begin", max_tokens=3, overlong="truncate").encode([("ꙮꙮ",)])
    assert len(example.ids) == 1 + 6 + 1
    assert example.scored_bytes == 2


def test_scored_bytes_leave_out_what_is_no_target() -> None:
    text = "the cat sat on the mat"
    whole = task().encode([(text,)])[0]
    pieces = [len(KINDS["byte level"].decode([int(token)])) for token in whole.ids[:-1]]
    assert whole.scored_bytes == len(text) - pieces[0]
    assert task(max_tokens=4, overlong="split").encode([(text,)])[0].scored_bytes == len(text) - pieces[0]
    cut_off = task(max_tokens=4, overlong="truncate").encode([(text,)])[0]
    assert cut_off.scored_bytes == sum(pieces[1:4])
    assert (cut_off.fate, cut_off.spans) == ("truncated", ((0, 4),))
    for policy, fate in (("drop", "dropped"), ("error", "overlong")):
        left_out = task(max_tokens=4, overlong=policy).encode([(text,)])[0]
        assert (left_out.fate, left_out.spans, left_out.scored_bytes) == (fate, (), 0)


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(2, 300), max_tokens=st.integers(2, 60))
def test_split_makes_every_token_but_the_first_a_target_exactly_once(tokens: int, max_tokens: int) -> None:
    spans, fate = cut(tokens, max_tokens, "split")
    targets = [token for start, length in spans for token in range(start + 1, start + length)]
    assert targets == list(range(1, tokens))
    assert all(2 <= length <= max_tokens for _, length in spans)
    assert fate == ("kept" if tokens <= max_tokens else "split")


def test_a_document_of_one_token_has_nothing_to_predict() -> None:
    (example,) = task().encode([(END,)])
    assert example.ids.tolist() == [0]
    assert (example.fate, example.spans, example.scored_bytes) == ("no_target", (), 0)


def test_no_documents_and_pickling() -> None:
    assert task().encode([]) == []
    assert pickle.loads(pickle.dumps(task())) == task()

"""Text from tokens: characters of several tokens, special tokens, stop strings; however the tokens come."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from distft.model.decoding import Spelling, TextStream
from distft.serving.text import AnswerText, StopStrings

from .tiny_models import SMOLLM2, tokenizer

BYTES = tokenizer(**SMOLLM2)
STOP = 2


def llama2() -> PreTrainedTokenizerFast:
    """Words with their space before them, and bytes for what is no word: as Llama 2 has it."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "▁a", "▁b", "bc"]
    backend = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


LLAMA2 = llama2()


def cuts(items: list[int], places: list[int]) -> list[list[int]]:
    """Items in pieces."""
    ends = [0, *sorted(place % (len(items) + 1) for place in places), len(items)]
    return [items[start:end] for start, end in pairwise(ends)]


@given(st.text(), st.lists(st.integers(0, 1000)), st.integers(0, 3))
def test_pieces_joined_are_the_text_that_all_ids_decode_to(text: str, places: list[int], missing: int) -> None:
    ids = BYTES(text)["input_ids"]
    ids = ids[: len(ids) - missing]  # the last character may be cut
    stream = TextStream(BYTES)
    pieces = [stream.add(piece) for piece in cuts(ids, places)]
    assert "".join(pieces) + stream.end() == BYTES.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.text("abc é東🙂"), st.lists(st.integers(0, 1000)))
def test_pieces_joined_are_the_text_where_words_carry_their_space_and_bytes_are_tokens(
    text: str, places: list[int]
) -> None:
    ids = LLAMA2(text)["input_ids"]
    stream = TextStream(LLAMA2)
    assert "".join(stream.add(piece) for piece in cuts(ids, places)) + stream.end() == LLAMA2.decode(ids)


def test_text_that_goes_on_after_a_prompt_keeps_its_first_space() -> None:
    prompt, answer = LLAMA2("a b")["input_ids"], LLAMA2.convert_tokens_to_ids(["▁b", "▁a"])
    stream = TextStream(LLAMA2, prompt)
    assert stream.add(answer[:1]) + stream.add(answer[1:]) == " b a"


def test_special_tokens_are_not_shown_and_a_flood_of_broken_bytes_comes_through() -> None:
    (broken,) = BYTES.convert_tokens_to_ids(["ÿ"])  # the byte 0xFF, which no character has
    stream = TextStream(BYTES)
    shown = stream.add([1, *BYTES("ab")["input_ids"], 0]) + "".join(stream.add([broken]) for _ in range(100))
    assert shown.startswith("ab\ufffd")
    assert len(shown + stream.end()) == 102


def test_the_work_grows_with_the_text_and_not_with_its_square() -> None:
    def seconds(tokens: int) -> float:
        stream, start = TextStream(BYTES), time.process_time()
        for number in BYTES("word " * (tokens // 5))["input_ids"]:
            stream.add([number])
        return time.process_time() - start

    seconds(100)
    assert seconds(8000) < 30 * seconds(1000)  # 8 times; the square would be 64


def test_the_bytes_of_a_token_are_told() -> None:
    spelling = Spelling(BYTES)
    ids = BYTES("é <|im_end|>")["input_ids"]
    assert b"".join(map(spelling, ids)) == "é <|im_end|>".encode()
    assert spelling(ids[0]) == b"\xc3"
    assert spelling(10_000) == b""
    assert [Spelling(LLAMA2)(number) for number in LLAMA2.convert_tokens_to_ids(["▁a", "<0xE2>", "</s>"])] == [
        b" a",
        b"\xe2",
        b"</s>",
    ]


def whole(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(st.text("ab "), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 99)))
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], places: list[int]
) -> None:
    watch = StopStrings(stops)
    pieces = [watch.add("".join(map(chr, piece))) for piece in cuts(list(map(ord, text)), places)]
    assert "".join(pieces) + watch.end() == whole(text, stops)
    assert watch.found == any(stop in text for stop in stops)


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back() -> None:
    watch = StopStrings(["###", "\n\nUser:"])
    assert [watch.add(piece) for piece in ("one", "\n", "\nU", "ser", " two#", "#", "! three")] == [
        "one",
        "",
        "",
        "",
        "\n\nUser two",
        "",
        "##! three",
    ]
    assert watch.add(" \n\nUser: four") == " "
    assert watch.add("five") + watch.end() == ""


@pytest.mark.parametrize("step", [1, 3, 100])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(step: int) -> None:
    ids = BYTES("say it. END of it")["input_ids"]
    answer = AnswerText(BYTES, [STOP], ["END"])
    text, used = "", 0
    for start in range(0, len(ids), step):
        piece, of_it = answer.add(ids[start : start + step])
        text, used = text + piece, used + of_it
        if answer.stopped:
            break
    assert (text + answer.end(), used) == ("say it. ", len("say it. END"))


def test_an_answer_that_the_model_ends_shows_all_but_its_last_token() -> None:
    answer = AnswerText(BYTES, [STOP], ["###"])
    assert answer.add([*BYTES("so #")["input_ids"], STOP]) == ("so ", 5)
    assert (answer.end(), answer.stopped) == ("#", True)


def test_an_answer_that_a_limit_ends_is_not_stopped() -> None:
    answer = AnswerText(BYTES, [STOP])
    assert answer.add(BYTES("so é")["input_ids"][:-1]) == ("so ", 4)
    assert (answer.end(), answer.stopped) == ("\ufffd", False)

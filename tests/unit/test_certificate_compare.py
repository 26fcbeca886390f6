"""What the comparison of a certificate with replies makes of each difference: without a model, from made-up numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from distft.certificate import Ask, Certificate, Record, Reply, compare, proved, refuse
from distft.certificate.identity import Identity
from distft.errors import RunError

OWN = Identity({"a": "F32 2x2 aa", "b": "F32 2x2 bb"}, {"vocabulary": "x", "normaliser": "n"}, "t", (0, 2), {})
CHAT = ({"role": "user", "content": "x"},)
NUMBERS = {"logprobs": (-0.1, -0.2, -0.3, -0.1), "gaps": (3.0, 0.05, 2.0, 4.0)}
BARE = ((7, -0.5), (30, -0.6), (9, -0.7), (2, -0.9))
RECORDS = (
    Record(Ask((1, 5, 6), messages=CHAT), (7, 8, 9, 2), stopped=True, bare=BARE, **NUMBERS),
    Record(Ask((1, 8, 6), messages=CHAT), (7, 8, 9, 2), stopped=True, **NUMBERS),
    Record(Ask((5, 6), "text"), (7, 8, 9, 3), **NUMBERS),
)
CERTIFICATE = Certificate("run", "generation", "fp32", (0, 2), (0, 1, 2), OWN, RECORDS)
GOOD = [Reply(record.ask.ids, None, record.tokens, record.logprobs, record.stopped) for record in RECORDS]
LABELS = {"up": -0.1, "down": -2.4}
CLASSES = replace(
    CERTIFICATE,
    kind="classification",
    stops=(),
    records=(Record(Ask((5, 6), "text"), labels=LABELS, bare_labels={"up": -2.0, "down": -0.2}),),
)

Change = Callable[[Reply], Reply]


def reasons(change: Change, served: Identity | None = None, certificate: Certificate = CERTIFICATE) -> list[str]:
    return [finding.reason for finding in compare(certificate, [change(reply) for reply in GOOD], served)]


def same(reply: Reply) -> Reply:
    return reply


def wrote(*tokens: int, logprobs: tuple[float, ...], stopped: bool = False) -> Change:
    return lambda reply: replace(reply, tokens=tokens, logprobs=logprobs, stopped=stopped)


def louder(by: float) -> Change:
    return lambda reply: replace(reply, logprobs=tuple(value + by for value in reply.logprobs))


def read(change: Callable[[tuple[int, ...]], tuple[int, ...]], *, chats: bool = True, texts: bool = True) -> Change:
    """Other ids; conversations begin with 1 here, and texts do not."""
    return lambda reply: (
        replace(reply, ids=change(reply.ids or ())) if (chats if reply.ids[0] == 1 else texts) else reply
    )


def without_stop_token(reply: Reply) -> Reply:
    return replace(reply, tokens=reply.tokens[:3], logprobs=reply.logprobs[:3]) if reply.stopped else reply


def goes_on(reply: Reply) -> Reply:
    return replace(reply, tokens=(*reply.tokens, 11), logprobs=(*reply.logprobs, -1.0), stopped=False)


def refuses_chats(reply: Reply) -> Reply:
    return Reply(refused="no template") if reply.ids[0] == 1 else reply


@pytest.mark.parametrize(
    "change",
    [
        same,
        louder(1e-4),
        without_stop_token,
        lambda reply: replace(reply, ids=None, length=len(reply.ids)),
        lambda reply: replace(reply, logprobs=()),
    ],
)
def test_the_same_model_passes(change: Change) -> None:
    assert reasons(change) == reasons(change, OWN) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (read(lambda ids: (1, *ids)), "BOS"),
        (read(lambda ids: (1, *ids), chats=False), "BOS"),
        (read(lambda ids: ids[1:], texts=False), "BOS"),
        (read(lambda ids: (4, *ids), texts=False), "template"),
        (read(lambda ids: (1, 9, 9), texts=False), "template"),
        (refuses_chats, "template"),
        (read(lambda ids: (*ids[:-1], 99)), "tokenizer"),
        (read(lambda ids: (*ids[:-1], 99), chats=False), "tokenizer"),
        (read(lambda ids: (1, *ids[:-1], 99), chats=False), "tokenizer"),
        (lambda reply: replace(reply, ids=None, length=9), "tokenizer"),
        (goes_on, "stop token"),
        (wrote(7, logprobs=(-0.1,), stopped=True), "stop token"),
        (wrote(7, 8, logprobs=(-0.1, -0.2)), "generation settings"),
        (louder(0.01), "dtype"),
        (wrote(7, 99, logprobs=(-0.1, -0.25)), "dtype"),
        (louder(0.7), "weights"),
        (wrote(99, logprobs=(-0.1,)), "weights"),
        (wrote(7, 8, 9, 2, logprobs=(math.nan,) * 4, stopped=True), "weights"),
        (wrote(7, 30, logprobs=(-0.5, -0.6)), "adapter"),
    ],
)
def test_the_reason_is_found_from_behaviour_alone(change: Change, reason: str) -> None:
    assert set(reasons(change)) == {reason}
    assert len(reasons(change)) == 1


SCALED = replace(OWN, tensors={**OWN.tensors, "a": "F32 2x2 zz"})
HALVED = replace(OWN, tensors={"a": "BF16 2x2 zz", "b": "BF16 2x2 yy"})
PUNISHED = replace(OWN, settings={"repetition_penalty": 5.0})


@pytest.mark.parametrize(
    ("served", "change", "reason"),
    [
        (SCALED, same, "weights"),
        (SCALED, louder(0.01), "weights"),
        (HALVED, same, "dtype"),
        (HALVED, louder(0.7), "dtype"),
        (OWN, louder(0.01), "dtype"),
        (OWN, louder(0.7), "weights"),
        (SCALED, wrote(7, 30, logprobs=(-0.5, -0.6)), "adapter"),
        (PUNISHED, same, "generation settings"),
        (PUNISHED, wrote(99, logprobs=(-0.1,)), "generation settings"),
        (replace(OWN, stops=(0,)), same, "stop token"),
        (replace(OWN, stops=(0,)), goes_on, "stop token"),
        (replace(OWN, template="u"), same, "template"),
        (replace(OWN, template=None), refuses_chats, "template"),
        (replace(OWN, tokenizer={**OWN.tokenizer, "vocabulary": "y"}), same, "tokenizer"),
    ],
)
def test_hashes_settle_the_reason(served: Identity, change: Change, reason: str) -> None:
    assert reasons(change, served) == [reason]


def test_parts_of_a_tokenizer_that_libraries_write_otherwise_count_by_the_ids() -> None:
    other = replace(OWN, tokenizer={**OWN.tokenizer, "normaliser": "m"})
    assert reasons(same, other) == []
    (finding, *_) = compare(CERTIFICATE, [read(lambda ids: (*ids[:-1], 99))(reply) for reply in GOOD], other)
    assert "other in it: normaliser" in finding.what


def test_what_comes_after_a_near_tie_is_not_compared() -> None:
    bf16 = replace(CERTIFICATE, dtype="bf16")
    assert reasons(wrote(7, 99, 1, 1, logprobs=(-0.1, -0.24, -9, -9)), None, bf16) == []
    assert reasons(wrote(7, 8, 1, 1, logprobs=(-0.1, -0.2, -2.3, -9)), None, bf16) == ["weights"]
    assert reasons(louder(0.01), None, bf16) == []
    assert reasons(louder(0.1), None, bf16) == ["weights"]
    one = [replace(GOOD[0], logprobs=(-0.1, -0.2, -0.95, -0.1)), *GOOD[1:]]
    assert [finding.reason for finding in compare(bf16, one)] == ["weights"]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"up": -0.1001, "down": -2.4}, []),
        ({"up": -0.11, "down": -2.41}, ["dtype"]),
        ({"up": -2.1, "down": -0.19}, ["adapter"]),
        ({"up": -5.0, "down": -5.0}, ["weights"]),
        ({"up": math.nan, "down": -2.4}, ["weights"]),
        ({"up": -0.1}, ["weights"]),
    ],
)
def test_a_classifier_is_judged_by_its_labels(said: dict[str, float], found: list[str]) -> None:
    assert [one.reason for one in compare(CLASSES, [Reply((5, 6), labels=said)])] == found
    assert [one.reason for one in compare(CLASSES, [Reply(length=3, labels=said)])][:1] == ["tokenizer"]


def test_a_refusal_names_the_first_reason_and_the_others() -> None:
    findings = compare(CERTIFICATE, [goes_on(louder(0.7)(reply)) for reply in GOOD])
    with pytest.raises(RunError, match=r"x: this is not the model that was trained; weights: .*\n.*also stop token"):
        refuse(findings, "x")
    refuse([], "x")
    assert proved(CERTIFICATE, GOOD, OWN).startswith("3 prompts with equal ids, 12 tokens as trained, 2 stops")

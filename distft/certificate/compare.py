"""Certificate against replies: what differs, and the one likeliest reason of each difference. Pure functions.

What must be equal: the ids that are read, where an answer stops, and the tokens up to the first place where the two
likeliest were all but equal. Log-probabilities may differ by what the number format makes of another order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from distft.certificate.identity import Identity
from distft.certificate.record import Certificate, Record, Reply
from distft.errors import RunError

Reason = Literal["tokenizer", "BOS", "template", "adapter", "dtype", "weights", "stop token", "generation settings"]


class Tolerance(NamedTuple):
    """By how many nats log-probabilities may differ: on average over all tokens, and one token's."""

    mean: float
    worst: float


#: Measured with SmolLM2-135M, 370 tokens of 12 answers. The same weights by a plain pass and by ``generate`` (cache,
#: padding, a batch) differ in fp32 by 2e-6 on average and 1e-5 at most, in bf16 by 0.029 and 0.17. bf16 against fp32:
#: 0.031 and 0.18; fp16 against fp32: 0.003 and 0.017. So 16-bit formats get twice to three times that; fp32 gets what
#: lies far above its own noise (GPUs sum in other orders), and far below what a 16-bit format does. Logits of bf16 have
#: eight bits: gaps of 0.06 to 0.12 are ties.
TOLERANCES = {
    "fp32": Tolerance(2e-4, 2e-3),
    "fp16": Tolerance(0.01, 0.06),
    "bf16": Tolerance(0.06, 0.6),
    "quantised": Tolerance(0.5, 3.0),
}
_FLOOR = -27.6  # log 1e-12: a label that is less likely is not looked at closer


@dataclass(frozen=True)
class Finding:
    """A difference.

    Attributes:
        reason: Why.
        what: What was seen.
    """

    reason: Reason
    what: str


def compare(
    certificate: Certificate, replies: Sequence[Reply], served: Identity | None = None, dtype: str | None = None
) -> list[Finding]:
    """What differs between the model that was trained and the one that is served; nothing where it is the same.

    Each fault is told once, by its best reason, the one that explains most first. Without ``served`` the reasons are
    found from behaviour alone.

    Args:
        certificate: What the trained model answered.
        replies: What the served one did, in the order of the records.
        served: What the served folder's files are, where they can be seen.
        dtype: The format of the served numbers, a name of :data:`TOLERANCES`, where it may be another than the
            trained model's; weights are then judged by what they answer alone.
    """
    pairs = list(zip(certificate.records, replies, strict=True))
    findings = [*_read(certificate, pairs, served)]
    same = [(record, reply) for record, reply in pairs if reply.refused is None and _same_ids(record, reply)]
    walks = [_walk(record, reply, TOLERANCES[dtype or certificate.dtype]) for record, reply in same]
    findings += _settings(certificate, walks, served)
    changed = any(finding.reason == "generation settings" for finding in findings)
    findings += _model(certificate, walks, None if dtype else served, dtype or certificate.dtype, changed)
    order: dict[Reason, int] = {"tokenizer": 0, "BOS": 1, "template": 2, "adapter": 3, "dtype": 4, "weights": 5}
    return sorted(findings, key=lambda finding: order.get(finding.reason, 6))


def refuse(findings: Sequence[Finding], where: str) -> None:
    """Raises what :func:`compare` found.

    Raises:
        RunError: There is a finding.
    """
    if findings:
        first, *others = findings
        also = "".join(f"\n  also {finding.reason}: {finding.what}" for finding in others)
        raise RunError(
            f"this is not the model that was trained; {first.reason}: {first.what}{also}",
            where=where,
            fix="write the export again (distft export RUN), and serve its files as they are",
        )


def proved(certificate: Certificate, replies: Sequence[Reply], served: Identity | None) -> str:
    """One line that says what was compared, where there was no finding."""
    walks = [
        _walk(record, reply, TOLERANCES[certificate.dtype])
        for record, reply in zip(certificate.records, replies, strict=True)
    ]
    deltas = [delta for walk in walks for delta in walk.deltas]
    stops = sum(record.stopped for record in certificate.records)
    what = "labels" if certificate.kind == "classification" else "tokens"
    parts = [f"{len(walks)} prompts with equal ids", f"{len(deltas)} {what} as trained"]
    parts += [f"{stops} stops"] if stops else []
    if deltas:
        parts += [f"log-probabilities within {max(deltas):.1g} ({sum(deltas) / len(deltas):.1g} on average)"]
    parts += ["weights, tokenizer, template and settings by hash"] if served else []
    return ", ".join(parts)


def _same_ids(record: Record, reply: Reply) -> bool:
    if reply.ids is not None:
        return reply.ids == record.ask.ids
    return reply.length is None or reply.length == len(record.ask.ids)


def _read(
    certificate: Certificate, pairs: Sequence[tuple[Record, Reply]], served: Identity | None
) -> Iterator[Finding]:
    """How prompts became ids: at most one finding of texts, and one of conversations that they do not explain."""
    own = certificate.identity
    parts = (
        [] if served is None else [name for name in own.tokenizer if served.tokenizer.get(name) != own.tokenizer[name]]
    )
    wrong = [(record, reply) for record, reply in pairs if reply.refused is not None or not _same_ids(record, reply)]
    chats = [(record, reply) for record, reply in wrong if record.ask.messages is not None]
    texts = [(record, reply) for record, reply in wrong if record.ask.messages is None]
    if bos := next((found for pair in wrong if (found := _added(certificate, *pair))), None):
        yield Finding("BOS", bos)
    elif texts or (served is not None and served.tokenizer and set(parts) & {"vocabulary", "merges", "special tokens"}):
        by = f" (other in it: {', '.join(parts)})" if parts else ""
        yield Finding("tokenizer", _shown(*texts[0]) + by if texts else f"it is another one{by}")
    elif chats:
        yield Finding("template", _shown(*chats[0]))
    elif served is not None and own.template != served.template and _chats(certificate):
        yield Finding("template", "its text is another one" if served.template else "there is none")


def _chats(certificate: Certificate) -> bool:
    return any(record.ask.messages is not None for record in certificate.records)


def _added(certificate: Certificate, record: Record, reply: Reply) -> str | None:
    """What stands before the prompt, or is missing there, where that is special tokens and all the difference."""
    want = record.ask.ids
    if reply.ids is None:
        return None
    longer, shorter = (reply.ids, want) if len(reply.ids) > len(want) else (want, reply.ids)
    extra = longer[: len(longer) - len(shorter)]
    if not 1 <= len(extra) <= 2 or longer[len(extra) :] != shorter or set(extra) - set(certificate.special):
        return None
    if longer is want:
        return f"prompts lack the token {extra[0]} that they begin with in training"
    twice = " for the second time" if want[: len(extra)] == extra else ""
    return f"the token {extra[0]} is put before prompts{twice}"


def _shown(record: Record, reply: Reply) -> str:
    """Where the ids of a prompt first differ."""
    what = "a conversation" if record.ask.messages is not None else "a text" if record.ask.prompt else "token ids"
    if reply.refused is not None:
        return f"{what} is refused: {reply.refused}"
    want, got = record.ask.ids, reply.ids
    if got is None:
        return f"{what} becomes {reply.length} tokens, where training saw {len(want)}"
    place = next(
        (at for at, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), min(len(want), len(got))
    )
    return (
        f"{what} becomes {len(got)} tokens, where training saw {len(want)}; from place {place + 1} on they are "
        f"{list(got[place : place + 4])}, not {list(want[place : place + 4])}"
    )


@dataclass(frozen=True)
class _Walk:
    """A reply beside its record, up to the first place where they part.

    Attributes:
        deltas: Differences of log-probabilities, in nats.
        bare: The same against the model without its adapter; empty where that is not known.
        parted: What token is another, where the trained model was sure of its own.
        gap: By how much it was, in nats.
        stop: What is wrong with where it stops.
        short: Whether it was cut off before its limit.
    """

    deltas: tuple[float, ...]
    bare: tuple[float, ...] = ()
    parted: str | None = None
    gap: float = 0.0
    stop: str | None = None
    short: bool = False


def _walk(record: Record, reply: Reply, tolerance: Tolerance) -> _Walk:
    if record.labels:
        if record.labels.keys() != reply.labels.keys():
            return _Walk((), parted=f"its labels are {', '.join(reply.labels)}", gap=math.inf)
        return _Walk(_label_deltas(record.labels, reply.labels), _label_deltas(record.bare_labels, reply.labels))
    bare = tuple(
        abs(logprob - said) if token == got else tolerance.worst + abs(logprob - said)
        for (token, logprob), got, said in zip(record.bare, reply.tokens, reply.logprobs, strict=False)
    )
    deltas: list[float] = []
    for place, (want, got) in enumerate(zip(record.tokens, reply.tokens, strict=False)):
        gap = 0.0 if want == got else record.gaps[place]
        if reply.logprobs:
            deltas.append(_apart(record.logprobs[place], reply.logprobs[place], gap))
        if want != got:
            sure = f"token {got} at place {place + 1} of an answer, where training said {want} by {gap:.2g} nats"
            return _Walk(tuple(deltas), bare[: place + 1], sure if gap > tolerance.worst else None, gap)
    stop, short = _end(record, reply)
    return _Walk(tuple(deltas), bare, stop=stop, short=short)


def _apart(logprob: float, said: float, gap: float = 0.0) -> float:
    """By how many nats two differ beyond what choosing another of two likely tokens explains; inf for what is NaN."""
    difference = abs(logprob - said)
    return max(0.0, difference - gap) if math.isfinite(difference) else math.inf


def _label_deltas(labels: dict[str, float], said: dict[str, float]) -> tuple[float, ...]:
    floored = ((max(logprob, _FLOOR), max(said[name], _FLOOR)) for name, logprob in labels.items())  # NaN stays
    return tuple(_apart(*pair) for pair in floored)


def _end(record: Record, reply: Reply) -> tuple[str | None, bool]:
    """What is wrong with how an answer ends whose tokens are all the trained model's, and whether it was cut off."""
    whole = len(record.tokens)
    if record.stopped:
        untold = reply.stopped and len(reply.tokens) == whole - 1  # a server need not tell the token that stopped it
        if len(reply.tokens) > whole or (not reply.stopped and len(reply.tokens) == whole):
            return f"the answer goes on after {record.tokens[-1]}, which ends it in training", False
        if untold or (reply.stopped and len(reply.tokens) == whole):
            return None, False
    if reply.stopped and len(reply.tokens) < whole:
        last = reply.tokens[-1] if reply.tokens else record.tokens[0]
        return f"the answer ends at {last}, after which it goes on in training", False
    return None, len(reply.tokens) < whole


def _settings(certificate: Certificate, walks: Sequence[_Walk], served: Identity | None) -> Iterator[Finding]:
    """Where answers stop, and settings that change what is likeliest."""
    seen = next((walk.stop for walk in walks if walk.stop), None)
    writes = certificate.kind != "classification"
    if seen:
        yield Finding("stop token", seen)
    elif writes and served is not None and set(served.stops) != set(certificate.stops):
        yield Finding(
            "stop token",
            f"generation_config.json ends answers at {list(served.stops)}, training at {list(certificate.stops)}",
        )
    changed = (
        {}
        if served is None
        else {k: v for k, v in served.settings.items() if certificate.identity.settings.get(k) != v}
    )
    if writes and changed:
        named = ", ".join(f"{name}: {value}" for name, value in changed.items())
        yield Finding("generation settings", f"generation_config.json changes what is likeliest ({named})")
    elif any(walk.short for walk in walks):
        yield Finding("generation settings", "answers are cut off before as many tokens as were asked for")


def _model(
    certificate: Certificate, walks: Sequence[_Walk], served: Identity | None, dtype: str, changed: bool
) -> Iterator[Finding]:
    """Whether the numbers are those that were trained: at most one finding."""
    own = certificate.identity
    same_weights = served is not None and served.weights == own.weights
    if changed and same_weights:
        return  # the settings explain it
    deltas = [delta for walk in walks for delta in walk.deltas]
    mean, worst = (sum(deltas) / len(deltas), max(deltas)) if deltas else (0.0, 0.0)
    parted = next((walk.parted for walk in walks if walk.parted), None)
    allowed = TOLERANCES[dtype]
    loud = mean > allowed.mean or worst > allowed.worst
    if parted or loud:
        far = f"log-probabilities differ by {mean:.2g} on average and {worst:.2g} at most"
        seen = f"{far} (allowed: {allowed.mean:g} and {allowed.worst:g})"
        seen = parted if parted and not loud else f"{seen}; {parted}" if parted else seen
    elif served is None or same_weights:
        return
    else:
        seen = "the answers are the same within what rounding does"
    bare = [delta for walk in walks if walk.bare for delta in walk.bare]
    beside = [delta for walk in walks if walk.bare for delta in walk.deltas]
    if bare and (loud or parted) and sum(bare) / len(bare) < 0.25 * max(sum(beside) / max(1, len(beside)), mean):
        yield Finding("adapter", f"it answers as the model without its adapter does: the adapter is not merged; {seen}")
    elif served is not None and served.dtypes != own.dtypes and not served.dtypes <= own.dtypes:
        yield Finding(
            "dtype", f"weights are {', '.join(sorted(served.dtypes))}, not {', '.join(sorted(own.dtypes))}; {seen}"
        )
    elif served is not None and not same_weights:
        yield Finding("weights", f"{_tensors(own, served)}; {seen}")
    elif dtype == "fp32" and _is_coarse(mean, max([worst, *(walk.gap for walk in walks)])):
        yield Finding("dtype", f"it computes in a coarser format than fp32, in which it was trained; {seen}")
    else:
        all_there = "the tensors are those of training, and config.json or the engine makes something else of them; "
        yield Finding("weights", (all_there if same_weights else "") + seen)


def _is_coarse(mean: float, worst: float) -> bool:
    """Whether differences, and the leads of tokens that were others, are no more than what bf16 makes."""
    return mean <= TOLERANCES["bf16"].mean and worst <= TOLERANCES["bf16"].worst


def _tensors(own: Identity, served: Identity) -> str:
    """Which tensors are others."""
    names = own.tensors.keys() | served.tensors.keys()
    other = sorted(name for name in names if own.tensors.get(name) != served.tensors.get(name))
    return f"{len(other)} of {len(names)} tensors are others, {', '.join(other[:3])}{' ...' if len(other) > 3 else ''}"

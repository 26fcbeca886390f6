"""Whether a run's model is better than what it began from, and whether to ship it; from the run's own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from distft.report.facts import Facts
from distft.task.metrics import METRICS

#: Metrics whose name says too little.
TITLES = {
    "bits_per_byte": "bits per byte",
    "loss": "loss (nats per token)",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error",
    "bleu": "BLEU (0 to 100)",
    "chrf": "chrF (0 to 100)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "stop_rate": "stop rate",
    "length": "tokens per answer",
}
#: Fewer documents than this make an interval that says little, and answers that end by themselves less often than this
#: make a model that a person would not call finished.
FEW_DOCUMENTS, STOPS_ENOUGH = 30, 0.9

Call = Literal["ship", "look", "hold"]
Level = Literal["bad", "note", "good"]
_PRESSING: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Reason:
    """One reason for or against; ``bad`` ones hold the model back, ``note`` ones are to be looked at."""

    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a run came to.

    Attributes:
        call: ``ship``; ``look``: better, and there is something to look at first; ``hold``.
        title: That in a few words.
        finding: How much better or worse, with its interval; or why that is not known.
        reasons: What speaks against it, what is to be looked at, and what speaks for it.
    """

    call: Call
    title: str
    finding: str
    reasons: tuple[Reason, ...]


def title_of(metric: str, *, classes: bool = False) -> str:
    """A metric's name for people, with its unit where it has one."""
    return "loss (nats per text)" if classes and metric == "loss" else TITLES.get(metric, metric.replace("_", " "))


def plain(metric: str) -> str:
    """A metric's name in a sentence, without its unit."""
    return TITLES.get(metric, metric.replace("_", " ")).partition(" (")[0]


def sentence_case(name: str) -> str:
    """A name at the beginning of a sentence; ``chrF`` and ``ROUGE-L`` stay as they are."""
    return name[0].upper() + name[1:] if name.split()[0].islower() else name


def gained(metric: str, change: Mapping[str, float]) -> bool | None:
    """Whether a paired difference is a gain for sure; None where its interval includes zero, or none is one."""
    better = METRICS[metric].better
    if better is None or change["low"] <= 0 <= change["high"]:
        return None
    return (change["value"] < 0) == (better == "lower")


def sentence(scores: Mapping[str, Any], split: str, metric: str) -> str:
    """Whether the tuned model is better by its task's first metric, and how sure that is.

    Args:
        scores: ``evaluation.json``.
        split: validation or test.
        metric: The metric that tells (:func:`distft.task.metrics.headline`).
    """
    change = scores.get("difference", {}).get(split, {}).get(metric)
    if change is None or METRICS[metric].better is None:
        return ""
    by = f"in {plain(metric)}: the interval of the paired difference"
    gain = gained(metric, change)
    if gain is None:
        return f"No clear difference from {base_of(scores)} {by} includes zero. More steps or more data may tell."
    return f"{'Better' if gain else 'Worse'} than {base_of(scores)} {by} excludes zero{_chance(change)}."


def base_of(scores: Mapping[str, Any]) -> str:
    """What the tuned model is compared with: a base model has no classifier."""
    return "the most common label" if "classes" in scores else "the base model"


def _chance(change: Mapping[str, float]) -> str:
    if "p" not in change:
        return ""
    return " (p < 0.001)" if change["p"] < 0.001 else f" (p = {change['p']:.3f})"


def judge(facts: Facts) -> Verdict:
    """The verdict on a run in whatever state."""
    try:
        return _judge(facts)
    except (AttributeError, LookupError, TypeError, ValueError):
        return Verdict("hold", "It cannot be judged", "Its files are damaged, or of another version.", ())


def _judge(facts: Facts) -> Verdict:
    metric = facts.headline
    change = facts.scores.get("difference", {}).get("test", {}).get(metric) if metric else None
    reasons = tuple(sorted(_reasons(facts, metric), key=lambda reason: _PRESSING.index(reason.level)))
    if facts.status not in ("finished", "trained"):
        return Verdict("hold", _unfinished(facts), _finding(facts, metric), reasons)
    gain = gained(metric, change) if metric and change else None
    if change is None:
        return Verdict("hold", "Not compared with the base yet", _finding(facts, metric), reasons)
    if gain is None:
        return Verdict("hold", "Do not ship: no clear gain", _finding(facts, metric), reasons)
    if not gain:
        return Verdict("hold", f"Do not ship: worse than {base_of(facts.scores)}", _finding(facts, metric), reasons)
    if any(reason.level == "bad" for reason in reasons):
        return Verdict("hold", "Better, but do not ship yet", _finding(facts, metric), reasons)
    if any(reason.level == "note" for reason in reasons):
        return Verdict("look", "Better: ship it after a look at the notes", _finding(facts, metric), reasons)
    return Verdict("ship", "Ship it", _finding(facts, metric), reasons)


def _unfinished(facts: Facts) -> str:
    where = f" at step {facts.step:,}" + (f" of {facts.planned:,}" if facts.planned else "")
    if facts.silent_seconds is not None:
        return f"Broken off{where}: nothing heard since"
    titles = {
        "begun": "Begun, and nothing trained yet",
        "running": f"Still running{where}",
        "interrupted": f"Interrupted{where}",
        "failed": f"Failed{where}",
        "searched": "Searched; nothing trained on the best settings yet",
    }
    return titles.get(facts.status, f"In an unknown state ({facts.status})")


def _finding(facts: Facts, metric: str | None) -> str:
    scores = facts.scores
    if metric is None:
        return "No model of this run was scored on the test split."
    change = scores.get("difference", {}).get("test", {}).get(metric)
    if change is None:
        alone = scores.get("best", {}).get("test", {}).get(metric)
        known = f" The tuned model's {plain(metric)} is {interval(alone)}." if alone else ""
        return f"There is no score of {base_of(scores)} beside the tuned model's.{known}"
    before, after = (scores.get(model, {}).get("test", {}).get(metric) for model in ("base", "best"))
    values = f" from {number(before['value'])} to {number(after['value'])}" if before and after else ""
    name = sentence_case(plain(metric))
    _, *outer = _ends(change)
    low, high = (abs(change[end]) for end in outer)
    certain = change["low"] * change["high"] > 0
    ends = f"{number(low)} to {number(high)}" if certain else f"{number(change['low'])} to {number(change['high'])}"
    sure = f"(95 % interval {ends}, paired, {change['n']:,.0f} documents of the test split)"
    if change["value"] == 0:
        return f"{name} is the same as that of {base_of(scores)} {sure}."
    side = "lower" if change["value"] < 0 else "higher"
    return f"{name} went{values}: {number(abs(change['value']))} {side} than {base_of(scores)} {sure}."


def _ends(change: Mapping[str, float]) -> tuple[str, str, str]:
    """The names of a difference's value and of its ends, the one nearer to zero first."""
    near, far = sorted(("low", "high"), key=lambda end: abs(change[end]))
    return "value", near, far


def _reasons(facts: Facts, metric: str | None) -> Iterator[Reason]:
    """What speaks for and against."""
    yield from _of_state(facts)
    changes = facts.scores.get("difference", {}).get("test", {})
    for name, change in changes.items():
        gain = gained(name, change)
        if name == metric:
            said = {True: "excludes zero", False: "excludes zero, on the wrong side", None: "includes zero"}[gain]
            level: Level = {True: "good", False: "bad", None: "bad"}[gain]  # type: ignore[assignment]
            yield Reason(level, f"The interval of the paired difference in {plain(name)} {said}{_chance(change)}.")
        elif gain is False:
            by, low, high = (number(abs(change[end])) for end in _ends(change))
            yield Reason("note", f"{sentence_case(plain(name))} got worse by {by} (95 % interval {low} to {high}).")
    if also := [plain(name) for name, change in changes.items() if name != metric and gained(name, change)]:
        yield Reason("good", f"Better for sure in other scores: {', '.join(also)}.")
    yield from _of_scores(facts, metric, changes)
    yield from _of_data(facts)


def _of_state(facts: Facts) -> Iterator[Reason]:
    if facts.status == "failed":
        yield Reason("bad", f"It failed: {facts.result.get('reason') or 'no reason known'}")
    elif facts.status == "interrupted":
        yield Reason("bad", f"{facts.result.get('reason') or 'Interrupted'}. It goes on with --resume.")
    if facts.silent_seconds is not None:
        yield Reason("bad", "Its last sign of life is old: its process is probably gone. It goes on with --resume.")
    if facts.problems:
        yield Reason("bad", f"{len(facts.problems)} of its files cannot be read as they should.")
    if facts.status in ("finished", "trained"):
        if not (facts.run.export / "config.json").exists():
            yield Reason("bad", "There is no exported model: distft export writes it.")
        elif not (facts.run.export / "distft.json").exists():
            yield Reason("bad", "The export has no certificate, without which it is not served.")


def _of_scores(facts: Facts, metric: str | None, changes: Mapping[str, Any]) -> Iterator[Reason]:
    if metric and metric in changes and changes[metric]["n"] < FEW_DOCUMENTS:
        yield Reason("note", f"Only {changes[metric]['n']} documents were scored: a larger test split would tell more.")
    stops = facts.scores.get("best", {}).get("test", {}).get("stop_rate")
    if stops and stops["value"] < STOPS_ENOUGH:
        yield Reason("note", f"{stops['value']:.0%} of the answers end by themselves; the others were cut off.")
    looks = [look for look in facts.result.get("test_looks", []) if look.get("model") != "base"]
    if len(looks) > 1:
        text = f"The test split was looked at {len(looks)} times: choices made by it make it look better than it is."
        yield Reason("note", text)
    elif looks:
        yield Reason("good", "The test split was looked at once, after training.")
    losses = {line["step"]: line.get("loss") for line in facts.validations}
    last = max(losses, default=None)
    best = facts.result.get("best_step")
    if best in losses and last != best and losses[last] and losses[best]:
        text = f"Validation loss was best at step {best:,} of {last:,}, and that checkpoint is the model."
        yield Reason("good", text)


def _of_data(facts: Facts) -> Iterator[Reason]:
    leaks = facts.card.get("leaks", {})
    for kind, what in (("exact", "are also"), ("near", "are nearly the same as others")):
        count = leaks.get(kind, {}).get("documents", 0)
        if count:
            text = f"{count:,} held-out documents {what} in another split: scores may be too good. See the data card."
            yield Reason("note", text)
    if leaks and not any(leaks.get(kind, {}).get("documents", 0) for kind in ("exact", "near")):
        yield Reason("good", "No held-out document is a copy, exact or near, of one in another split.")


def number(value: float) -> str:
    """Four significant digits, so that ends of an interval stand even."""
    return f"{value:#.4g}".rstrip(".")


def interval(estimate: Mapping[str, float]) -> str:
    """``17.31 (16.02 to 18.55)``."""
    return f"{number(estimate['value'])} ({number(estimate['low'])} to {number(estimate['high'])})"

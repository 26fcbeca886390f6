"""How far a search is, and how long it will take."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distft.tuning.trials import Trial


@dataclass(frozen=True)
class SearchProgress:
    """A search as it stands.

    Attributes:
        trials: Those that have begun, in their order.
        of: How many there will be at most.
        metric: What is compared: ``validation.loss``.
        mode: Whether less or more of it is better.
        seconds_left: Until the last trial has ended, or None where nothing is known yet.
    """

    trials: Sequence[Trial]
    of: int
    metric: str
    mode: Literal["min", "max"]
    seconds_left: float | None = None

    @property
    def ended(self) -> int:
        """How many trials go on no more, failed ones included."""
        return sum(trial.status != "running" for trial in self.trials)


def seconds_left(trials: Sequence[Trial], of: int, concurrent: int, most_tokens: int) -> float | None:
    """How long a search will still take: the tokens that are expected of its trials, at the pace so far.

    The pace is seconds a token whatever the time went into, so the starts of workers and validations are in it; that
    of trials that ended, where there are some, since the tokens of the others are those of their last validation.

    Args:
        trials: Those that have begun, each with its seconds up to now.
        of: How many there will be.
        concurrent: How many run at the same time.
        most_tokens: The most tokens that any trial can train on.

    Returns:
        Seconds, or None where no trial has told of tokens yet.
    """
    running = [trial for trial in trials if trial.status == "running"]
    known = [trial for trial in trials if trial.status != "running" and trial.tokens] or running
    tokens, seconds = sum(trial.tokens for trial in known), sum(trial.seconds for trial in known)
    if not running and of <= len(trials):
        return 0.0
    if tokens == 0 or seconds <= 0:
        return None
    pace = seconds / tokens
    left = [expected_tokens(trials, 0, most_tokens) * pace] * (of - len(trials))
    for trial in running:
        since_told = trial.seconds - trial.tokens * pace
        left.append(max(0.0, expected_tokens(trials, trial.tokens, most_tokens) * pace - max(0.0, since_told)))
    return max(sum(left) / min(concurrent, len(left)), *left)


def expected_tokens(trials: Sequence[Trial], reached: int, most_tokens: int) -> float:
    """How many more tokens a trial that has come as far as ``reached`` will train on, on average.

    Trials that still run have shown only that they come this far: taking the mean of those that ended would count the
    early stopped ones alone. So this is the area under the Kaplan-Meier curve from ``reached`` to ``most_tokens``
    (Kaplan and Meier 1958, Nonparametric Estimation from Incomplete Observations).
    """
    tokens = sorted(trial.tokens for trial in trials)
    ends = Counter(trial.tokens for trial in trials if trial.status != "running" and trial.tokens >= reached)
    area, alive, here = 0.0, 1.0, reached
    for end, count in sorted(ends.items()):
        area += alive * (end - here)
        alive *= 1 - count / (len(tokens) - bisect_left(tokens, end))
        here = end
    return area + alive * max(0, most_tokens - here)

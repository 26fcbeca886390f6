"""The training tokens at which the trials of a search are compared."""

from __future__ import annotations

import math
from fractions import Fraction

from distft.config import Job
from distft.data.order import Order
from distft.tuning.space import section, trial_job
from distft.tuning.trials import Params

#: Keys that decide how many tokens a trial trains on: more of one is never fewer tokens.
_LENGTH = ("train.epochs", "train.steps", "train.batch_size", "data.max_tokens")


def whole_tokens(job: Job, params: Params, rows: int, tokens: int) -> int:
    """The training tokens of a trial that goes on to the end of its own schedule.

    A part of an epoch counts as its share of the epoch's tokens: what its rows really hold differs a little.

    Args:
        job: The job, which has a search.
        params: The trial's settings, or some of them.
        rows: Rows of the prepared training split.
        tokens: Their tokens, without padding.
    """
    trial = trial_job(job, params)
    used = Fraction(Order.of(trial, rows).total_rows * tokens, rows)
    if trial.train.steps is not None:  # so many rows, however long they are; epochs hold the same tokens
        used *= Fraction(trial.data.max_tokens, job.data.max_tokens)
    return math.ceil(used)


def most_tokens(job: Job, rows: int, tokens: int) -> int:
    """The most training tokens of any setting of the space; arguments as of :func:`whole_tokens`."""
    space = section(job).space
    return whole_tokens(job, {key: space[key].ends[1] for key in _LENGTH if key in space}, rows, tokens)


def rungs(most: int, grace: float, reduction: float) -> tuple[int, ...]:
    """The tokens at which trials are compared, ascending: ``grace`` of the most, then ``reduction`` times as many.

    These are the rungs of successive halving (Li et al., ASHA, https://arxiv.org/abs/1810.05934, algorithm 2), without
    those at or above ``most``, which only finished trials reach.

    Args:
        most: The most training tokens of any trial, above 0.
        grace: Fraction of them that every trial may go before it can be stopped.
        reduction: Above 1.
    """
    first = max(1, math.ceil(grace * most))
    levels: list[int] = []
    while (level := math.ceil(first * reduction ** len(levels))) < most:
        levels.append(level)
    return tuple(dict.fromkeys(levels))


def even_rungs(most: int, interval: float) -> tuple[int, ...]:
    """The tokens at which a population is compared, ascending: every ``interval`` of the most, below ``most``.

    Args:
        most: The most training tokens of any trial, above 0.
        interval: Fraction of them.
    """
    return tuple(range(max(1, math.ceil(interval * most)), most, max(1, math.ceil(interval * most))))

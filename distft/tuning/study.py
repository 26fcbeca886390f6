"""Trials as optuna knows them. optuna is imported where it is used: it takes a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distft.config import SearchSection
from distft.config.search import Space
from distft.tuning.trials import Trial

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


@contextmanager
def quiet() -> Iterator[None]:
    """Without what optuna says on the terminal, and its warnings of features that may change."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def distributions(search: SearchSection) -> dict[str, BaseDistribution]:
    """Where each key is looked for."""
    return {key: _distribution(space) for key, space in search.space.items()}


def _distribution(space: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.listed is not None:
        return CategoricalDistribution(space.listed)
    low, high = space.ends
    if space.int_uniform is not None:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=space.log_uniform is not None)


def study(search: SearchSection, trials: Sequence[Trial], sampler: BaseSampler | None = None) -> Study:
    """A study, in memory, of trials in the order of their numbers."""
    import optuna

    made = optuna.create_study(direction="minimize" if search.objective.mode == "min" else "maximize", sampler=sampler)
    axes = distributions(search)
    for trial in sorted(trials, key=lambda trial: trial.number):
        made.add_trial(_frozen(trial, axes))
    return made


def _frozen(trial: Trial, axes: dict[str, BaseDistribution]) -> FrozenTrial:
    """A trial as optuna keeps it; one that ended without an objective has failed."""
    from optuna.trial import TrialState, create_trial

    states = {"running": TrialState.RUNNING, "finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
    state = states.get(trial.status, TrialState.FAIL)
    if trial.objective is None and state != TrialState.RUNNING:
        state = TrialState.FAIL
    return create_trial(
        state=state,
        value=trial.objective if state == TrialState.COMPLETE else None,
        params=trial.params,
        distributions=axes,
        intermediate_values=dict(trial.values),
    )

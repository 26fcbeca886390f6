"""What a search tries next: a pure function of the job, the trial's number and the trials known so far.

Nothing of a searcher's state is kept: a search that is resumed goes on from its list of trials alone.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from distft.config import Job, SearchSection
from distft.config.search import Space, own_value, trial_values
from distft.tuning.study import distributions, quiet, study
from distft.tuning.trials import Params, Trial

#: Digits of a drawn number, at least: what people read in a table is the number itself.
_DIGITS = 4

#: Times that a setting is drawn before one that was not tried is looked up.
_ATTEMPTS = 8

#: Settings among which TPE takes the most promising one: optuna's own number.
_CANDIDATES = 24


def ask(job: Job, number: int, known: Sequence[Trial]) -> Params | None:
    """The settings of a trial.

    Training is deterministic, so no settings are tried twice where the space can be counted; where it cannot, they are
    as good as never drawn twice. ``grid`` takes one combination after the other. For ``random`` and ``optuna`` the
    first trial has the job's own settings, where the space holds them: a search ends no worse than the job began.
    ``optuna`` then covers the space evenly until a few trials have an objective, and asks the multivariate TPE sampler
    from then on (Bergstra et al., NeurIPS 2011; Watanabe, https://arxiv.org/abs/2304.11127): trials stopped early
    count less than finished ones, and settings that run now count as poor, so that others are tried beside them.

    Args:
        job: The job, which has a search.
        number: The trial's number, from 0.
        known: The trials before it, in any order and state.

    Returns:
        Values by dotted name, or None where no trial, or nothing new in the space, is left.
    """
    search = section(job)
    points = space_points(search)
    if number >= search.trials:
        return None
    if search.algorithm == "grid":
        return point(search, number) if points is None or number < points else None
    if number == 0 and (own := own_params(job)) is not None:
        return own
    tried = {_values(search, trial.params) for trial in known}
    if points is not None and len(tried) >= points:
        return None
    for attempt in range(_ATTEMPTS):
        params = _draw(search, job.seed, number, known, attempt)
        if _values(search, params) not in tried:
            return params
    start = derived_seed(job.seed, "rest", number)
    rest = (point(search, (start + step) % points) for step in range(points)) if points is not None else iter([params])
    return next(params for params in rest if points is None or _values(search, params) not in tried)


def _values(search: SearchSection, params: Params) -> tuple[int | float, ...]:
    """A setting as something that can be looked up."""
    return tuple(params[key] for key in search.space)


def _draw(search: SearchSection, seed: int, number: int, known: Sequence[Trial], attempt: int) -> Params:
    """A setting by the search's algorithm; later attempts differ more from what was drawn first."""
    own_seed = derived_seed(seed, number, attempt)
    compared = sum(trial.objective is not None and trial.status in {"finished", "stopped"} for trial in known)
    if search.algorithm == "optuna" and compared >= start_up_trials(search):
        return _most_promising(search, own_seed, known, candidates=1 if attempt else _CANDIDATES)
    if search.algorithm == "optuna" and attempt == 0:
        return spread(search, seed, number)
    draw = random.Random(own_seed)
    return at(search, [draw.random() for _ in search.space])


def start_up_trials(search: SearchSection) -> int:
    """Trials that need an objective before the next one follows from it."""
    return max(3, min(10, search.trials // 4))


def _most_promising(search: SearchSection, seed: int, known: Sequence[Trial], candidates: int) -> Params:
    """What TPE would try next."""
    with quiet():
        from optuna.samplers import TPESampler

        sampler = TPESampler(
            seed=seed, n_startup_trials=1, n_ei_candidates=candidates, multivariate=True, constant_liar=True
        )
        drawn = study(search, known, sampler).ask(distributions(search)).params
    return {
        key: drawn[key] if space.listed is not None or space.int_uniform is not None else rounded(space, drawn[key])
        for key, space in search.space.items()
    }


def section(job: Job) -> SearchSection:
    """The search of a job, which must have one."""
    assert job.search is not None, "the job has no search"
    return job.search


def trial_job(job: Job, params: Mapping[str, int | float], workers: int | None = None) -> Job:
    """The job of a trial: its own settings in their places, no search.

    Args:
        job: The job, which has a search.
        params: Values by dotted name.
        workers: Its workers; None: as many as the search gives each trial.

    Raises:
        InvalidJob: The job refuses the settings.
    """
    values = trial_values(job, params)
    values["cluster"]["workers"] = workers or section(job).workers_per_trial
    return Job.from_values(values, job.folder)


def changes_data(params: Mapping[str, int | float]) -> bool:
    """Whether a trial needs rows of its own."""
    return any(key.startswith("data.") for key in params)


def own_params(job: Job) -> Params | None:
    """The job's own values of the searched keys; None where one of them is open (``auto``) or not in its space."""
    found = {key: _own(space, own_value(job, key)) for key, space in section(job).space.items()}
    known = {key: value for key, value in found.items() if value is not None}
    return known if len(known) == len(found) else None


def _own(space: Space, value: Any) -> int | float | None:
    """A job's value as the space would give it; None where it would not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if space.listed is not None:
        return next((one for one in space.listed if one == value), None)
    low, high = space.ends
    if not low <= value <= high or (space.int_uniform is not None and value != int(value)):
        return None
    return int(value) if space.int_uniform is not None else float(value)


def space_points(search: SearchSection) -> int | None:
    """Settings that the space holds; None where a key takes any number between two."""
    sizes = [_size(space) for space in search.space.values()]
    return math.prod(size for size in sizes if size) if all(sizes) else None


def _size(space: Space) -> int | None:
    """Values of one key; None where they cannot be counted."""
    if space.listed is not None:
        return len(space.listed)
    low, high = space.int_uniform or (1, 0)
    return high - low + 1 or None


def point(search: SearchSection, index: int) -> Params:
    """One setting of a space that can be counted, the values in their order, the last key changing first."""
    params: Params = {}
    for key, space in reversed(search.space.items()):
        index, place = divmod(index, _size(space) or 1)
        params[key] = space.listed[place] if space.listed is not None else int(space.ends[0]) + place
    return {key: params[key] for key in search.space}


def at(search: SearchSection, unit: Sequence[float]) -> Params:
    """The setting at a place of the unit cube, one coordinate in [0, 1) a key: equal volumes are equally likely."""
    return {key: _at(space, u) for (key, space), u in zip(search.space.items(), unit, strict=True)}


def _at(space: Space, u: float) -> int | float:
    if space.listed is not None:
        return space.listed[int(u * len(space.listed))]
    low, high = space.ends
    if space.int_uniform is not None:
        return int(low) + int(u * (high - low + 1))
    if space.log_uniform is not None:
        return rounded(space, math.exp(math.log(low) + u * math.log(high / low)))
    return rounded(space, low + u * (high - low))


def rounded(space: Space, value: float) -> float:
    """A number drawn from a range, with few digits: still in the range, which has a thousand such numbers at least."""
    low, high = space.ends
    digits = _DIGITS + max(0, math.floor(-math.log10((high - low) / max(abs(low), abs(high)))))
    return min(max(float(f"{value:.{digits}g}"), float(low)), float(high))


def spread(search: SearchSection, seed: int, number: int) -> Params:
    """Setting ``number`` of a sequence whose first few already cover the space evenly.

    The additive recurrence on the generalised golden ratio (M. Roberts, "The Unreasonable Effectiveness of
    Quasirandom Sequences", 2018), moved by the seed (Cranley and Patterson, SIAM J. Numer. Anal. 13, 1976). optuna's
    QMCSampler would do as well, but needs scipy.
    """
    ratio = 1.0
    for _ in range(64):
        ratio = (1.0 + ratio) ** (1.0 / (len(search.space) + 1))
    shift = random.Random(derived_seed(seed, "spread"))
    return at(search, [(shift.random() + number * ratio ** -(axis + 1)) % 1.0 for axis in range(len(search.space))])


def derived_seed(seed: int, *parts: int | str) -> int:
    """A seed of 32 bits for one thing out of many that are drawn."""
    text = " ".join(["distft search", str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

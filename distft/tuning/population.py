"""Population based training: poor trials go on from good ones' weights, with settings that are a little different.

Jaderberg et al., Population Based Training of Neural Networks, https://arxiv.org/abs/1711.09846: truncation selection,
perturbed settings. All trials are compared at the same tokens, so what comes of it depends neither on how many run at
the same time nor on which is faster.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from distft.config import SearchSection
from distft.config.search import Space
from distft.tuning.space import at, derived_seed, rounded
from distft.tuning.trials import Params, Trial

#: The part of the population that is poor, and the part that is good; how often a setting is drawn anew rather than
#: perturbed, and by what factors: Ray Tune's own numbers, the paper's for small populations.
QUANTILE, RESAMPLED, FACTORS = 0.25, 0.25, (0.8, 1.2)

#: Times that settings are perturbed until they differ: at the end of a range they may come out as they were.
_ATTEMPTS = 8


def exploits(search: SearchSection, seed: int, rung: int, population: Sequence[Trial]) -> dict[str, tuple[str, Params]]:
    """Which trials go on from which others, and with what settings.

    Args:
        search: The job's section.
        seed: The job's.
        rung: The number of the rung, from 0.
        population: The trials that have come to it, in any order; one without an objective there is the poorest.

    Returns:
        By id of the poor trial, the id of a good one and settings beside that one's.
    """
    sign = 1.0 if search.objective.mode == "min" else -1.0
    here = max((trial.values[-1][0] for trial in population if trial.values), default=0)
    in_order = sorted(population, key=lambda trial: trial.number)
    known = [trial for trial in in_order if trial.values and trial.values[-1][0] == here]
    unknown = [trial for trial in in_order if trial not in known]
    known.sort(key=lambda trial: sign * trial.values[-1][1])
    count = min(math.ceil(QUANTILE * len(population)), len(population) // 2)
    good, poor = known[:count], [*known, *unknown][len(population) - count :]
    found = {}
    for trial in poor if good else []:
        draw = random.Random(derived_seed(seed, "exploit", rung, trial.number))
        source = draw.choice(good)
        found[trial.id] = source.id, explore(search, source.params, draw)
    return found


def explore(search: SearchSection, params: Params, draw: random.Random) -> Params:
    """Settings beside others, in the space; not the same, since training with those is deterministic."""
    found = params
    for _ in range(_ATTEMPTS):
        anew = at(search, [draw.random() for _ in search.space])
        found = {
            key: anew[key] if draw.random() < RESAMPLED else _perturbed(space, params[key], draw)
            for key, space in search.space.items()
        }
        if found != params:
            break
    return found


def _perturbed(space: Space, value: int | float, draw: random.Random) -> int | float:
    """A value a factor away, in its range; of a list, the one before or after."""
    if space.listed is not None:
        values = sorted(space.listed)
        place = values.index(value) + draw.choice((-1, 1))
        return values[min(max(place, 0), len(values) - 1)]
    changed = value * draw.choice(FACTORS)
    low, high = space.ends
    return round(min(max(changed, low), high)) if space.int_uniform is not None else rounded(space, changed)

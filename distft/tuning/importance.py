"""Which of the searched keys made a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from distft.config import Job
from distft.tuning.space import section
from distft.tuning.study import quiet, study
from distft.tuning.trials import Trial

#: Trials below which nothing is said: with six, planted parameters were named rightly half the time, with eight mostly.
_ENOUGH = 8


def importance(job: Job, trials: Sequence[Trial]) -> dict[str, float]:
    """How much each key had to do with a trial being among the better half.

    PED-ANOVA (Watanabe et al., https://arxiv.org/abs/2304.10255), which asks only for the order of trials, so that
    those stopped early count too: they were worse at equal tokens. It tells a direction to look in, no more.

    Args:
        job: The job, which has a search.
        trials: All of its trials.

    Returns:
        Shares that sum to 1 by dotted name, the largest first; empty where the trials with an objective are too few.
    """
    search = section(job)
    compared = [replace(trial, status="finished") for trial in trials if trial.status in {"finished", "stopped"}]
    compared = [trial for trial in compared if trial.objective is not None]
    if len(compared) < _ENOUGH:
        return {}
    with quiet():
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5, evaluate_on_local=False)
        shares = get_param_importances(study(search, compared), evaluator=evaluator)
    return shares if all(math.isfinite(share) for share in shares.values()) else {}

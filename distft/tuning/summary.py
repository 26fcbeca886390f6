"""What a search came to, as ``search/summary.json`` keeps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distft.config.search import SearchSection
from distft.tuning.trials import Trial, best_trial


def summary(
    search: SearchSection,
    trials: Sequence[Trial],
    *,
    importance: Mapping[str, float],
    whole_tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The best settings and what finding them took, ready for JSON.

    Args:
        search: The job's section.
        trials: All trials.
        importance: How much each setting mattered (:func:`distft.tuning.importance.importance`); empty where unknown.
        whole_tokens: What each trial trains on from the first to the last step of its own schedule, by id, where that
            is known: what the same trials would have used without early stopping.
    """
    best = best_trial(trials, search.objective.mode)
    known = whole_tokens is not None and all(trial.id in whole_tokens for trial in trials)
    return {
        "metric": search.objective.metric,
        "mode": search.objective.mode,
        "best": best and {"id": best.id, "params": best.params, "objective": best.objective},
        "trials": dict(Counter(trial.status for trial in trials)),
        "tokens": sum(trial.tokens for trial in trials),
        "tokens_without_stopping": sum(whole_tokens[trial.id] for trial in trials) if whole_tokens and known else None,
        "seconds_of_trials": round(sum(trial.seconds for trial in trials), 1),
        "importance": dict(importance),
    }

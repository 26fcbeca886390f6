"""A search in the page: its pictures, its best settings, and the trials' table."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np

from distft.report.charts import Chart, Drawn, Line, as_svg, draw
from distft.report.facts import Facts
from distft.report.tables import LISTED
from distft.report.words import duration
from distft.tuning import pictures
from distft.tuning.labels import number, score, settings, short_names, varied
from distft.tuning.trials import Trial, best_trial, ranked

#: Trials that have a curve of their own.
CURVES = 24


def search(facts: Facts) -> dict[str, Any] | None:
    """All about the run's search; None where it had none."""
    if not facts.trials:
        return None
    metric, mode = _objective(facts)
    best = best_trial(facts.trials, mode)
    names = varied(facts.trials)
    short = short_names(names)
    known = ranked(facts.trials, mode)
    rest = [trial for trial in facts.trials if trial not in known]
    shown = [*known, *rest][:LISTED]
    importance = facts.search.get("importance") or {}
    return {
        "metric": metric,
        "better": "lower" if mode == "min" else "higher",
        "best": best and {"id": best.id, "score": score(best.objective), "settings": settings(best.params)},
        "counts": facts.search.get("trials", {}),
        "tokens": _count(facts.search.get("tokens")),
        "without_stopping": _count(facts.search.get("tokens_without_stopping")),
        "names": [short[name] for name in names],
        "rows": [
            {
                "id": trial.id,
                "best": trial is best,
                "params": [number(trial.params[name]) if name in trial.params else "-" for name in names],
                "tokens": f"{trial.tokens:,}",
                "score": score(trial.objective),
                "status": trial.status,
                "time": duration(trial.seconds),
                "reason": trial.reason or "",
            }
            for trial in shown
        ],
        "hidden": len(facts.trials) - len(shown),
        "importance": [(short_names(importance)[name], round(100 * share)) for name, share in importance.items()],
        "curves": _curves(facts.trials, metric, mode, best),
        "parallel": _parallel(facts, metric, mode),
    }


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _objective(facts: Facts) -> tuple[str, Literal["min", "max"]]:
    section = facts.job.search if facts.job else None
    metric = facts.search.get("metric") or (section.objective.metric if section else "objective")
    mode = facts.search.get("mode") or (section.objective.mode if section else "min")
    return str(metric), cast(Literal["min", "max"], mode)


def _curves(trials: list[Trial], metric: str, mode: Literal["min", "max"], best: Trial | None) -> Drawn | None:
    """The objective of each trial over its tokens, within the limits that tell good ones apart; the best in front."""
    low, high = pictures.sensible_limits([value for trial in trials for _, value in trial.values], mode)
    others = [trial for trial in ranked(trials, mode) if trial is not best][: CURVES - 1]
    lines = []
    for trial in (*reversed(others), *([best] if best else [])):
        tokens, values = np.array(trial.values, dtype=np.float64).reshape(-1, 2).T
        within = np.where((values >= low) & (values <= high), values, np.nan)
        name = f"{trial.id} (best)" if trial is best else trial.id
        lines.append(Line(name, tokens, within, "b" if trial is best else "a", faint=trial is not best, dots=True))
    beyond = sum(any(not low <= value <= high for _, value in trial.values) for trial in trials)
    note = f"{beyond} trials have values beyond this frame." if beyond else ""
    return draw(Chart("search-curves", f"{metric} of each trial", tuple(lines), x_title="training tokens", note=note))


def _parallel(facts: Facts, metric: str, mode: Literal["min", "max"]) -> str | None:
    """All settings beside what they came to, on white paper in dark pages too: its shades mean something."""
    section = facts.job.search if facts.job else None
    if section is None:
        return None
    log = {name for name, space in section.space.items() if space.log_uniform is not None}
    figure = pictures.parallel_coordinates(facts.trials, metric, mode, list(section.space), log)
    return as_svg(figure, "search-parallel")

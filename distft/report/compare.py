"""Several runs on one page: scores side by side, curves on top of each other, and the settings that differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distft import __version__
from distft.report.charts import SERIES, Chart, Colour, Drawn, Line, Values, draw, running_mean
from distft.report.curves import WINDOW, interval_picture, values
from distft.report.facts import Facts, read
from distft.report.page import fill, put
from distft.report.tables import flat
from distft.report.verdict import interval, judge, number, sentence_case, title_of
from distft.report.words import duration, moment, without_passwords
from distft.runs import Run
from distft.task.metrics import METRICS

#: Settings that do not say how a run was made.
NAMES = frozenset({"name"})
HEADS = ("state", "steps", "score", "difference from its base", "wall time", "goodput", "tokens/s", "memory")
#: Runs that have a colour of their own; the others' curves share the last.
LAST: Colour = SERIES[-1]


def write(runs: Sequence[Run], to: Path) -> Path:
    """Writes the page that compares some runs, whole or not at all.

    Raises:
        JobError: It cannot be written there.
    """
    return put(render([read(run) for run in runs]), to)


def render(all_facts: Sequence[Facts]) -> str:
    """The page as HTML."""
    metric = _metric(all_facts)
    charts = list(_charts(all_facts))
    return fill(
        "compare.html",
        title=f"{len(all_facts)} runs compared",
        about=", ".join(facts.run.name for facts in all_facts),
        sections=[("runs", "Runs"), *([("curves", "Curves")] if charts else []), ("settings", "Settings that differ")],
        problems=_cautions(all_facts, metric),
        finding=_finding(all_facts, metric),
        heads=[title_of(metric) if metric and head == "score" else head for head in HEADS],
        rows=[
            {"name": facts.run.name, "call": judge(facts).title, "cells": _cells(facts, metric)} for facts in all_facts
        ],
        intervals=_intervals(all_facts, metric),
        charts=charts,
        differing=differing(all_facts),
        footer=f"Made by distft {__version__} on {moment(time.time())}",
    )


def _metric(all_facts: Sequence[Facts]) -> str | None:
    """The first run's first metric that was scored."""
    return next((facts.headline for facts in all_facts if facts.headline), None)


def _score(facts: Facts, metric: str | None) -> dict[str, float] | None:
    found = facts.scores.get("best", {}).get("test", {}).get(metric) if metric else None
    return found if isinstance(found, dict) else None


def _cautions(all_facts: Sequence[Facts], metric: str | None) -> list[str]:
    """What makes a comparison unfair, or a run's figures doubtful."""
    told = [f"{facts.run.name}: {problem}" for facts in all_facts for problem in facts.problems]
    scored = [facts for facts in all_facts if _score(facts, metric)]
    if len({str(facts.card.get("fingerprint")) for facts in scored}) > 1:
        told.append("These runs were trained or scored on different data: their scores do not compare.")
    if len({facts.kind for facts in all_facts}) > 1:
        told.append("These runs have different tasks.")
    return told


def _finding(all_facts: Sequence[Facts], metric: str | None) -> str:
    """The best run by the first metric, and whether its interval is apart from the next one's."""
    better = METRICS[metric].better if metric else None
    scored = [(its["value"], its, facts.run.name) for facts in all_facts if (its := _score(facts, metric))]
    if metric is None or better is None or not scored:
        return "None of these runs was scored on its test split."
    order = sorted(scored, key=lambda one: one[0], reverse=better == "higher")
    told = f"{order[0][2]} has the best {title_of(metric)}: {interval(order[0][1])}."
    if len(order) < 2:
        return told
    first, second = order[0][1], order[1][1]
    apart = first["high"] < second["low"] or second["high"] < first["low"]
    how = "apart from" if apart else "within reach of"
    return f"{told} Its interval is {how} that of {order[1][2]}, {interval(second)}; documents are not paired here."


def _cells(facts: Facts, metric: str | None) -> list[tuple[str, str]]:
    score = _score(facts, metric)
    change = facts.scores.get("difference", {}).get("test", {}).get(metric) if metric else None
    speeds, memory = (_known(facts, name) for name in ("tokens_per_second", "peak_memory_bytes"))
    return [
        (facts.status, ""),
        (f"{facts.step:,}", f"of {facts.planned:,}" if facts.planned else ""),
        _estimate(score),
        _estimate(change),
        (duration(facts.wall_seconds) if facts.wall_seconds else "-", ""),
        (f"{facts.spent.share:.1%}" if facts.spent else "-", ""),
        (f"{np.median(speeds):,.0f}" if len(speeds) else "-", "median"),
        (f"{memory.max() / 1e9:.2f} GB" if len(memory) else "-", "fullest rank"),
    ]


def _known(facts: Facts, name: str) -> Values:
    """One number of each step, of those that have it."""
    found = values(facts.steps, name)
    return found[np.isfinite(found)]


def _estimate(its: dict[str, float] | None) -> tuple[str, str]:
    return (number(its["value"]), f"{number(its['low'])} to {number(its['high'])}") if its else ("-", "")


def _intervals(all_facts: Sequence[Facts], metric: str | None) -> dict[str, str] | None:
    rows = [
        (facts.run.name, its, _colour(place))
        for place, facts in enumerate(all_facts)
        if (its := _score(facts, metric)) is not None
    ]
    if metric is None or not rows:
        return None
    title = title_of(metric)
    return {
        "title": f"{sentence_case(title)} on the test split, 95 % intervals",
        "says": "; ".join(f"{name} {interval(its)}" for name, its, _ in rows),
        "svg": interval_picture(rows, "intervals"),
    }


def _colour(place: int) -> Colour:
    return SERIES[place] if place < len(SERIES) else LAST


def _charts(all_facts: Sequence[Facts]) -> list[Drawn]:
    """Validation and training loss, learning rate and speed of all runs on top of each other."""
    wanted = [
        ("validation", "Validation loss", "validations", "loss", True, 1),
        ("loss", "Training loss, smoothed", "steps", "loss", False, WINDOW),
        ("learning-rate", "Learning rate", "steps", "learning_rate", False, 1),
        ("speed", "Tokens per second, smoothed", "steps", "tokens_per_second", False, WINDOW),
    ]
    made = []
    for key, title, kind, name, dots, share in wanted:
        lines = []
        for place, facts in enumerate(all_facts):
            records = getattr(facts, kind)
            found = values(records, name)
            smooth = running_mean(found, len(found) // share) if share > 1 and len(found) > share else found
            lines.append(Line(facts.run.name, values(records, "step"), smooth, _colour(place), dots=dots))
        drawn = draw(Chart(key, title, tuple(lines)))
        made += [drawn] if drawn else []
    return made


def differing(all_facts: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs, with each one's value; decided ones as decided."""
    settings = []
    for facts in all_facts:
        job, decided = (facts.resolved.get(part) for part in ("job", "decisions"))
        decided = decided if isinstance(decided, dict) else {}
        found: dict[str, Any] = flat(job) if isinstance(job, dict) else {}
        found |= {key: its.get("value") for key, its in decided.items() if isinstance(its, dict)}
        settings.append(found)
    keys = dict.fromkeys(key for found in settings for key in found if key not in NAMES)
    return [
        (key, ["-" if key not in found else without_passwords(str(found[key])) for found in settings])
        for key in keys
        if len({repr(found.get(key)) for found in settings}) > 1
    ]

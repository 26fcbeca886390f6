"""The curves of a training run as charts; what happened to the run is marked in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distft.report.charts import (
    SERIES,
    SIZE,
    STAND_INS,
    TEXT,
    Chart,
    Colour,
    Line,
    Mark,
    Values,
    as_svg,
    dress,
    running_mean,
)
from distft.report.facts import Facts, Record
from distft.tuning.labels import number

#: Events that are marked, with the mark's colour; of many, so many are.
MARKED: dict[str, Colour] = {
    "restart": "d",
    "resume": "d",
    "resize": "e",
    "preempted": "d",
    "skipped": "f",
    "failed": "f",
    "exploit": "e",
}
MOST_MARKS = 40
#: A curve with more points than this is drawn pale, and its mean over a twentieth of it on top.
NOISY, WINDOW = 40, 20


def curves(facts: Facts) -> list[Chart]:
    """All charts that the run has numbers for, the loss first."""
    marks = marks_of(facts.events)
    steps = values(facts.steps, "step")
    made = [
        _loss(facts, steps, marks),
        _validated(facts, marks),
        _one("learning-rate", "Learning rate", facts, steps, "learning_rate", marks, say=number),
        _norm(facts, steps, marks),
        _one("speed", "Tokens per second", facts, steps, "tokens_per_second", marks, mean=True),
        _memory(facts, steps, marks),
        _workers(facts, steps, marks),
    ]
    return [chart for chart in made if chart is not None]


def marks_of(events: Sequence[Record]) -> tuple[Mark, ...]:
    """What happened to the run, by step; of an event at one step the last."""
    found = {(line["step"], line.get("event")): line for line in events if line.get("event") in MARKED}
    marks = [Mark(float(step), str(name), MARKED[str(name)]) for step, name in sorted(found)]
    return tuple(marks[:MOST_MARKS])


def values(lines: Sequence[Record], name: str) -> Values:
    """One number of each line, (N,); NaN where it has none."""
    found = (line.get(name) for line in lines)
    return np.array([one if isinstance(one, int | float) else np.nan for one in found], dtype=np.float64)


def smoothed(label: str, x: Values, y: Values, colour: Colour) -> tuple[Line, ...]:
    """A line; where it has many points, pale, with its mean in front."""
    if len(y) <= NOISY:
        return (Line(label, x, y, colour),)
    width = max(3, len(y) // WINDOW)
    return Line(label, x, y, colour, faint=True), Line(f"{label}, mean of {width:,}", x, running_mean(y, width), colour)


def _loss(facts: Facts, steps: Values, marks: tuple[Mark, ...]) -> Chart:
    at, losses = values(facts.validations, "step"), values(facts.validations, "loss")
    best = facts.result.get("best_step")
    lines = (
        *smoothed("training", steps, values(facts.steps, "loss"), "a"),
        Line("validation", at, losses, "b", dots=True),
    )
    note = f"The model is that of step {best:,}, which has the lowest validation loss." if best else ""
    unit = "text" if facts.kind == "classification" else "token"
    return Chart("loss", f"Loss (nats per {unit})", lines, marks=marks, note=note)


def _validated(facts: Facts, marks: tuple[Mark, ...]) -> Chart | None:
    accuracy = values(facts.validations, "accuracy")
    if not np.isfinite(accuracy).any():
        return None
    line = Line("validation", values(facts.validations, "step"), accuracy, "b", dots=True)
    return Chart("accuracy", "Validation accuracy", (line,), marks=marks, format=lambda value: f"{value:.3g}")


def _one(
    key: str,
    title: str,
    facts: Facts,
    steps: Values,
    name: str,
    marks: tuple[Mark, ...],
    *,
    say: Any = None,
    mean: bool = False,
) -> Chart | None:
    found = values(facts.steps, name)
    if not np.isfinite(found).any():
        return None
    lines = smoothed(title.lower(), steps, found, "a") if mean else (Line(title.lower(), steps, found),)
    return Chart(key, title, lines, marks=marks, format=say or _amount)


def _norm(facts: Facts, steps: Values, marks: tuple[Mark, ...]) -> Chart | None:
    chart = _one("grad-norm", "Gradient norm", facts, steps, "grad_norm", marks, mean=True, say=number)
    limit = facts.job.train.max_grad_norm if facts.job else None
    if chart is None or limit is None:
        return chart
    clipped = int((values(facts.steps, "grad_norm") > limit).sum())
    note = f"Before clipping: {clipped:,} of {len(steps):,} steps were scaled down to {limit:g}."
    return Chart(chart.key, chart.title, chart.lines, marks=marks, format=number, note=note)


def _memory(facts: Facts, steps: Values, marks: tuple[Mark, ...]) -> Chart | None:
    """Each rank's peak; of many ranks the fullest and the emptiest, where the run recorded them."""
    ranks = max((len(line.get("rank_peak_memory_bytes") or ()) for line in facts.steps), default=0)
    most = values(facts.steps, "peak_memory_bytes") / 1e9
    if not np.isfinite(most).any():
        return None
    if ranks == 0:
        return Chart(
            "memory", "Peak memory of the fullest rank (GB)", (Line("fullest rank", steps, most),), marks=marks
        )
    found = [line.get("rank_peak_memory_bytes") or () for line in facts.steps]
    if ranks <= len(SERIES):
        each = np.array([[its[rank] if rank < len(its) else np.nan for its in found] for rank in range(ranks)])
        lines = tuple(Line(f"rank {rank}", steps, each[rank] / 1e9, SERIES[rank]) for rank in range(ranks))
    else:
        least = np.array([min(its, default=np.nan) for its in found]) / 1e9
        lines = (Line("fullest rank", steps, most, "a"), Line("emptiest rank", steps, least, "b"))
    return Chart("memory", "Peak memory by rank (GB)", lines, marks=marks)


def _workers(facts: Facts, steps: Values, marks: tuple[Mark, ...]) -> Chart | None:
    found = values(facts.steps, "world_size")
    if len(set(found[np.isfinite(found)].tolist())) < 2:
        return None
    return Chart("workers", "Workers", (Line("workers", steps, found),), marks=marks, format=lambda value: f"{value:g}")


def _amount(value: float) -> str:
    """A speed: ``85``, ``1,250``, ``12.5k``."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interval_picture(rows: Sequence[tuple[str, Mapping[str, float], Colour]], key: str) -> str:
    """Values with their intervals, one below the other on one scale: what a verdict rests on.

    Args:
        rows: Name, estimate and colour of each, the first on top.
        key: The picture's name in the page.
    """
    figure = Figure(figsize=(SIZE[0], 0.5 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, its, colour) in enumerate(reversed(rows)):
        axes.plot(
            [its["low"], its["high"]], [place, place], color=STAND_INS[colour], linewidth=3.2, solid_capstyle="round"
        )
        axes.plot([its["value"]], [place], "o", color=STAND_INS[colour], markersize=8)
    dress(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], fontsize=TEXT)
    axes.tick_params(axis="y", length=0, labelcolor=STAND_INS["ink"])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    return as_svg(figure, key)


def marked(events: Sequence[Record]) -> Iterator[str]:
    """Which events are marked in the charts, each once."""
    seen = {str(line.get("event")) for line in events}
    return (name for name in MARKED if name in seen)

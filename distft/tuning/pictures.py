"""A search as two pictures: the learning curve of each trial, and its settings beside what they came to.

Drawn with matplotlib's objects alone: ``pyplot`` keeps figures and a window system for the whole process. Colours are
those of Okabe and Ito (2008, Color Universal Design) and shades of one hue, told apart by colour-blind eyes too.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from distft.config.search import SearchSection
from distft.runs import Run
from distft.tuning.labels import number, score, settings, short_names
from distft.tuning.trials import Status, Trial, best_trial

Mode = Literal["min", "max"]

DOTS_PER_INCH = 150
HEIGHT_INCHES, WIDTH_INCHES, AXIS_INCHES = 4.8, 8.0, 2.0
LETTERS_PER_INCH = 13
TEXT, SMALL = 10, 9
INK, FRAME, BEST = "#222222", "#999999", "#D55E00"
COLOURS: dict[Status, str] = {"finished": "#0072B2", "running": "#56B4E9", "stopped": "#AAAAAA", "failed": "#CC79A7"}
TITLES: dict[Status, str] = {
    "finished": "finished",
    "running": "still running",
    "stopped": "stopped early",
    "failed": "failed",
}
#: A setting with no more values than this, one of them used twice, has a place for each value.
MOST_PLACES = 8
#: How far apart the lines through one such place are spread, and how near to an axis's end no other tick stands.
SPREAD, NEAR = 0.07, 0.05


def write_pictures(run: Run, search: SearchSection, trials: Sequence[Trial]) -> None:
    """Writes ``learning-curves.png`` and ``parallel-coordinates.png``, each whole or not at all.

    Args:
        run: Where to.
        search: The job's section.
        trials: All trials; also none.
    """
    metric, mode = search.objective.metric, search.objective.mode
    log = {name for name, space in search.space.items() if space.log_uniform is not None}
    _write(learning_curves(trials, metric, mode), run.learning_curves)
    _write(parallel_coordinates(trials, metric, mode, list(search.space), log), run.parallel_coordinates)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    temporary.replace(path)


def learning_curves(trials: Sequence[Trial], metric: str, mode: Mode) -> Figure:
    """The objective over training tokens, a line a trial; the legend names the best and counts the others.

    Values far worse than the others are beyond the frame, so that one trial that diverged does not flatten the rest;
    the picture says how many trials that are.
    """
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    axes = figure.add_subplot()
    best = best_trial(trials, mode)
    for status in ("failed", "stopped", "running", "finished"):
        those = [trial for trial in trials if trial.status == status]
        for place, trial in enumerate(trial for trial in those if trial is not best):
            label = f"{TITLES[status]} ({len(those)})" if place == 0 else None
            _curve(axes, trial, COLOURS[status], label, width=0.8 if status in ("stopped", "failed") else 1.5)
    if best:
        label = _wrapped(f"best: {best.id}, {settings(best.params)}", 0.6 * WIDTH_INCHES)
        _curve(axes, best, BEST, label, width=2.8, front=True)
    known = [value for trial in trials for _, value in trial.values]
    low, high = sensible_limits(known, mode)
    room = 0.06 * (high - low)
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0, None if known else 1000)
    _note(axes, trials, low, high, mode)
    axes.set_xlabel("training tokens", fontsize=TEXT)
    axes.set_ylabel(f"{metric} ({_better(mode)})", fontsize=TEXT)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    if trials:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=SMALL)
    return figure


def _note(axes: Axes, trials: Sequence[Trial], low: float, high: float, mode: Mode) -> None:
    """Says what cannot be seen, in the corner of the worst values."""
    outside = sum(any(not low <= value <= high for _, value in trial.values) for trial in trials)
    if not any(trial.values for trial in trials):
        said = "no trial was validated"
    elif outside:
        said = f"{outside} {'trial has' if outside == 1 else 'trials have'} values beyond this frame"
    else:
        return
    height, side = (0.98, "top") if mode == "min" else (0.02, "bottom")
    axes.text(0.99, height, said, transform=axes.transAxes, ha="right", va=side, fontsize=SMALL, color=INK)


def _wrapped(label: str, inches: float) -> str:
    """In lines of that width, broken after commas only."""
    kept = label.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    return textwrap.fill(kept, int(inches * LETTERS_PER_INCH)).replace("\N{NO-BREAK SPACE}", " ")


def _curve(axes: Axes, trial: Trial, colour: str, label: str | None, width: float, front: bool = False) -> None:
    tokens, values = zip(*trial.values, strict=True) if trial.values else ((), ())
    axes.plot(
        tokens,
        values,
        color=colour,
        linewidth=width,
        linestyle="--" if trial.status == "failed" else "-",
        marker="o",
        markersize=5.5 if front else 3,
        label=label,
        zorder=4 if front else {"finished": 3, "running": 3}.get(trial.status, 2),
    )


def sensible_limits(values: Sequence[float], mode: Mode) -> tuple[float, float]:
    """From the best value to the worst one that is not far off: within two spreads of the middle half."""
    if not values:
        return 0.0, 1.0
    ordered = sorted(values)
    lower, upper = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    spread = max(upper - lower, 1e-9 * abs(upper))
    if mode == "min":
        low, high = ordered[0], max(value for value in ordered if value <= upper + 2 * spread)
    else:
        low, high = min(value for value in ordered if value >= lower - 2 * spread), ordered[-1]
    return (low, high) if high > low else (low - 0.5, high + 0.5)


@dataclass(frozen=True)
class Scale:
    """One upright axis: where each value stands, and what is written beside it.

    Attributes:
        title: What it shows.
        place: Value -> height, 0 to 1.
        ticks: (height, text).
        spread: How far apart lines through one place are drawn; 0 where few share one.
    """

    title: str
    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]
    spread: float = 0.0


def parallel_coordinates(
    trials: Sequence[Trial], metric: str, mode: Mode, names: Sequence[str], log: Collection[str]
) -> Figure:
    """An upright axis for each setting and one for the objective; a line a trial, darker where it is better.

    Lines that share a place are spread in the order of their objective. Trials without an objective are dotted and end
    before its axis. The legend names the best.

    Args:
        trials: All of a search.
        metric: What was compared: ``validation.loss``.
        mode: Whether less or more of it is better.
        names: The dotted names of what was varied, in the order of the axes.
        log: Those of them that have a logarithmic axis.
    """
    short, best = short_names(names), best_trial(trials, mode)
    scales = [
        _setting_scale(short[name], [trial.params[name] for trial in trials if name in trial.params], name in log)
        for name in names
    ]
    known = [trial.objective for trial in trials if trial.objective is not None and trial.status != "failed"]
    objectives = _number_scale(f"{metric}\n({_better(mode)})", known, *sensible_limits(known, mode))
    width = max(WIDTH_INCHES, AXIS_INCHES * (len(scales) + 1))
    figure = Figure(figsize=(width, HEIGHT_INCHES), layout="constrained")
    axes = figure.add_subplot()
    worst_first = sorted(trials, key=lambda trial: _badness(trial, mode), reverse=True)
    for rank, trial in enumerate(worst_first):
        aside = 0.5 - rank / max(1, len(trials) - 1) if len(trials) > 1 else 0.0
        aside = aside if mode == "min" else -aside
        heights = [
            scale.place(trial.params[name]) + aside * scale.spread
            for name, scale in zip(names, scales, strict=True)
            if name in trial.params
        ]
        if trial.objective is None or trial.status == "failed":
            axes.plot(range(len(heights)), heights, color=FRAME, linewidth=0.8, linestyle=":", zorder=1)
            continue
        height = objectives.place(trial.objective)
        goodness = 1 - height if mode == "min" else height
        colour = BEST if trial is best else mpl.colormaps["Blues"](0.25 + 0.75 * goodness)
        axes.plot(
            range(len(heights) + 1),
            [*heights, height],
            color=colour,
            linewidth=2.8 if trial is best else 1.1,
            zorder=4 if trial is best else 2,
        )
    for place, scale in enumerate([*scales, objectives]):
        _upright(axes, place, scale)
    _bare(axes, [*(scale.title for scale in scales), objectives.title])
    if best:
        label = f"best: {best.id}, {settings(best.params)}, {metric} {score(best.objective)}"
        axes.plot([], [], color=BEST, linewidth=2.8, label=_wrapped(label, 0.9 * width))
        figure.legend(loc="outside upper left", frameon=False, fontsize=SMALL)
    return figure


def _badness(trial: Trial, mode: Mode) -> float:
    if trial.objective is None or trial.status == "failed":
        return math.inf
    return trial.objective if mode == "min" else -trial.objective


def _upright(axes: Axes, place: int, scale: Scale) -> None:
    axes.plot([place, place], [0, 1], color=INK, linewidth=1.2, zorder=5)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
    for height, text in scale.ticks:
        axes.plot([place, place + 0.02], [height, height], color=INK, linewidth=1.0, zorder=5)
        axes.text(place + 0.035, height, text, va="center", ha="left", fontsize=SMALL, color=INK, bbox=box, zorder=6)


def _bare(axes: Axes, titles: Sequence[str]) -> None:
    """Nothing but the titles below: what else there is to see stands on the upright axes."""
    axes.set_xlim(-0.25, len(titles) - 1 + 0.45)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xticks(range(len(titles)), titles, fontsize=TEXT)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _setting_scale(title: str, values: Sequence[float], log: bool) -> Scale:
    distinct = sorted(set(values))
    if len(distinct) <= 1 or (len(distinct) <= MOST_PLACES and len(distinct) < len(values)):
        return _places(title, distinct)
    if not log or distinct[0] <= 0:
        return _number_scale(title, values, distinct[0], distinct[-1])
    low, high = math.log10(distinct[0]), math.log10(distinct[-1])

    def place(value: float) -> float:
        return (math.log10(value) - low) / (high - low)

    decades = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    inner = [(place(value), number(value)) for value in decades if NEAR < place(value) < 1 - NEAR]
    return Scale(f"{title}\n(logarithmic)", place, [(0.0, number(distinct[0])), *inner, (1.0, number(distinct[-1]))])


def _places(title: str, distinct: Sequence[float]) -> Scale:
    """A place for each value, evenly apart, whatever their distances are."""
    if len(distinct) == 1:
        heights = {distinct[0]: 0.5}
    else:
        heights = {
            value: SPREAD / 2 + (1 - SPREAD) * index / (len(distinct) - 1) for index, value in enumerate(distinct)
        }
    ticks = [(height, number(value)) for value, height in heights.items()]
    return Scale(title, heights.__getitem__, ticks, SPREAD)


def _number_scale(title: str, values: Sequence[float], low: float, high: float) -> Scale:
    """An even axis from ``low`` to ``high``; values beyond stand at its end, which then says so."""
    if len(set(values)) <= 1:
        return Scale(title, lambda value: 0.5, [(0.5, score(value)) for value in set(values)])

    def place(value: float) -> float:
        return min(1.0, max(0.0, (value - low) / (high - low)))

    inner = [value for value in MaxNLocator(5).tick_values(low, high) if NEAR < place(value) < 1 - NEAR]
    below = "≤ " if any(value < low for value in values) else ""
    above = "≥ " if any(value > high for value in values) else ""
    ends = [(0.0, f"{below}{low:.4g}"), (1.0, f"{above}{high:.4g}")]
    return Scale(title, place, [*ends, *((place(value), f"{value:.4g}") for value in inner)])


def _better(mode: Mode) -> str:
    return "less is better" if mode == "min" else "more is better"

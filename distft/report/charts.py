"""Line charts as inline SVG: small, readable on a phone, in the page's own colours, light and dark.

Why matplotlib: it is there already, for the pictures of a search. Its SVG is text in the page: 10 to 60 kB a chart
against 4.5 MB for Plotly's script (its lighter bundles are not on PyPI), drawn before any script runs, and printable.
What Plotly has more, a hand-lens under the pointer, is a few lines of script in the page (``page.js``).

Text stays text (``svg.fonttype: none``) and colours are names: matplotlib is given colours that stand for others, and
the page says what these are in light and in dark.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Values = NDArray[np.float64]
Colour = Literal["a", "b", "c", "d", "e", "f", "ink", "muted", "grid", "card"]

#: What matplotlib is told, and the page's colour that it stands for.
STAND_INS: dict[Colour, str] = {
    "a": "#0a0001",
    "b": "#0a0002",
    "c": "#0a0003",
    "d": "#0a0004",
    "e": "#0a0005",
    "f": "#0a0006",
    "ink": "#0a0007",
    "muted": "#0a0008",
    "grid": "#0a0009",
    "card": "#0a000a",
}
SERIES: tuple[Colour, ...] = ("a", "b", "c", "d", "e", "f")

#: Inches of 72 points, and points of text: at a phone's 390 pixels a chart has almost its own size.
SIZE, TEXT = (5.0, 3.0), 12
#: A line is drawn with at most four points in each of so many columns (:func:`thin`).
COLUMNS = 400
#: Lines that the legend names one by one.
NAMED_LINES = 8
#: Rows of the table that says the same as a chart.
ROWS = 12


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a chart.

    Attributes:
        label: What it is.
        x: Where its points stand, ascending, (N,).
        y: Their heights, (N,); NaN where there is none.
        colour: Its colour.
        faint: Thin and pale: behind a mean of itself.
        dots: Whether each point has a dot.
    """

    label: str
    x: Values
    y: Values
    colour: Colour = "a"
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step, drawn upright."""

    x: float
    label: str
    colour: Colour = "d"


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart, as it is meant.

    Attributes:
        key: Its name in the page: letters and hyphens.
        title: What it shows, with its unit.
        lines: Its lines.
        x_title: What is below.
        marks: What happened.
        format: A height as text.
        note: A word more, below it.
    """

    key: str
    title: str
    lines: tuple[Line, ...]
    x_title: str = "step"
    marks: tuple[Mark, ...] = ()
    format: Callable[[float], str] = field(default=lambda value: f"{value:.4g}")
    note: str = ""


@dataclass(frozen=True)
class Drawn:
    """A chart in the page.

    Attributes:
        key: Its name.
        title: Its title.
        svg: The picture.
        says: The same in words.
        head: The head of the table that says the same.
        rows: Its rows.
        legend: Lines by (colour, label), where there are several.
        lens: What the page's script shows under the pointer, as JSON.
        note: A word more.
    """

    key: str
    title: str
    svg: str
    says: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[tuple[str, str], ...]
    lens: str
    note: str


def thin(x: Values, y: Values, columns: int = COLUMNS) -> tuple[Values, Values]:
    """Fewer points that look the same: of each column the first, the lowest, the highest and the last one.

    Extremes are kept, so that a spike of one step stays where it is (the "M4" of Jugel et al., VLDB 2014).

    Args:
        x: Ascending, (N,).
        y: Heights, (N,); NaN ones are passed over.
        columns: How many columns; so at most four times as many points.
    """
    known = np.flatnonzero(np.isfinite(y))
    if len(known) <= 4 * columns:
        return x[known], y[known]
    x, y = x[known], y[known]
    column = np.minimum((x - x[0]) * columns // max(x[-1] - x[0], 1e-12), columns - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(starts[1:], len(x))
    kept = {0, len(x) - 1}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        part = y[start:end]
        kept |= {start, start + int(part.argmin()), start + int(part.argmax()), end - 1}
    places = np.array(sorted(kept))
    return x[places], y[places]


def running_mean(y: Values, width: int) -> Values:
    """The mean of up to ``width`` points around each, fewer at the ends, (N,); NaN ones are passed over."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(y))
    first, after = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(y))
    seen = counts[after] - counts[first]
    return np.where(seen > 0, (sums[after] - sums[first]) / np.maximum(seen, 1), np.nan)


def draw(chart: Chart) -> Drawn | None:
    """The chart for the page; None where it has no point at all."""
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        x, y = thin(line.x, line.y)
        _plot(axes, line, x, y)
    for mark in chart.marks:
        axes.axvline(mark.x, color=STAND_INS[mark.colour], linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)
    dress(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    places = np.concatenate([line.x[np.isfinite(line.y)] for line in lines])
    if np.ptp(places) == 0:  # one place has no scale
        axes.set_xlim(places[0] - 1, places[0] + 1)
    axes.xaxis.set_major_formatter(lambda value, _: thousands(value))
    whole = all((line.y[np.isfinite(line.y)] % 1 == 0).all() for line in lines)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axes.yaxis.set_major_formatter(lambda value, _: chart.format(value))
    axes.set_xlabel(chart.x_title, fontsize=TEXT, color=STAND_INS["muted"])
    svg = as_svg(figure, chart.key)
    return Drawn(
        key=chart.key,
        title=chart.title,
        svg=svg,
        says=_words(chart, lines),
        head=(chart.x_title, *(line.label for line in lines)),
        rows=tuple(_rows(chart, lines)),
        legend=tuple(_legend(lines)) if len(lines) > 1 else (),
        lens=_lens(chart, lines, figure, axes),
        note=chart.note,
    )


def _legend(lines: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """Lines by (colour, label); of very many the pale ones as one."""
    pale = [line for line in lines if line.faint]
    for line in lines:
        if not line.faint or len(lines) <= NAMED_LINES:
            yield "faint " * line.faint + line.colour, line.label
    if pale and len(lines) > NAMED_LINES:
        yield f"faint {pale[0].colour}", f"{len(pale)} others"


def _plot(axes: Axes, line: Line, x: Values, y: Values) -> None:
    dots = line.dots or len(x) == 1
    axes.plot(
        x,
        y,
        color=STAND_INS[line.colour],
        alpha=0.4 if line.faint else 1.0,
        linewidth=1.0 if line.faint else 1.9,
        marker="o" if dots else None,
        markersize=4.5,
        zorder=2 if line.faint else 3,
    )


def dress(axes: Axes) -> None:
    """The same quiet frame for every picture."""
    axes.grid(color=STAND_INS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(STAND_INS["grid"])
    axes.tick_params(labelsize=TEXT, color=STAND_INS["grid"], labelcolor=STAND_INS["muted"])


def thousands(value: float) -> str:
    """A whole number as short as a scale has room for: ``12``, ``2,500``, ``100k``, ``1.2M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.4g}" if value != int(value) else f"{int(value):,}"


def as_svg(figure: Figure, key: str) -> str:
    """A figure as an ``svg`` element: hidden from readers, to whom the page says the same in words.

    Args:
        figure: Drawn with the colours of :data:`STAND_INS`, or with others, which then stay.
        key: Its name in the page; ids in it begin so, since all pictures share one page.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": TEXT}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    for colour, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    return svg


def _words(chart: Chart, lines: Sequence[Line]) -> str:
    """What each line does: where it begins and ends, its lowest and its highest point."""
    told = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        x, y = line.x[known], line.y[known]
        first, last = chart.format(float(y[0])), chart.format(float(y[-1]))
        text = f"{line.label}: {first} at {chart.x_title} {thousands(float(x[0]))}"
        if len(y) > 1:
            low, high = int(y.argmin()), int(y.argmax())
            text += (
                f", {last} at {thousands(float(x[-1]))}; lowest {chart.format(float(y[low]))} at "
                f"{thousands(float(x[low]))}, highest {chart.format(float(y[high]))} at {thousands(float(x[high]))}"
            )
        told.append(text)
    marks = [f"{mark.label} at {chart.x_title} {thousands(mark.x)}" for mark in chart.marks[:ROWS]]
    return ". ".join([*told, *([f"Marked: {', '.join(marks)}"] if marks else [])]) + "."


def _rows(chart: Chart, lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """A few places of all lines, evenly apart, with the value nearest before each."""
    places = np.unique(np.concatenate([line.x[np.isfinite(line.y)] for line in lines]))
    if len(places) > ROWS:
        places = places[np.unique(np.linspace(0, len(places) - 1, ROWS).round().astype(int))]
    rows = []
    for place in places.tolist():
        cells = []
        for line in lines:
            known = np.isfinite(line.y)
            before = int(np.searchsorted(line.x[known], place, side="right")) - 1
            exact = before >= 0 and line.x[known][before] == place
            cells.append(chart.format(float(line.y[known][before])) if exact else "")
        rows.append((thousands(place), *cells))
    return rows


def _lens(chart: Chart, lines: Sequence[Line], figure: Figure, axes: Axes) -> str:
    """What the script needs: where the frame lies in the picture, what it spans, and each line's points."""
    box, (width, height) = axes.get_position(), figure.get_size_inches() * 72
    low, high = axes.get_xlim()
    series = []
    for line in lines:
        x, y = thin(line.x, line.y, COLUMNS // 2)
        series.append(
            {"label": line.label, "x": [_short(one) for one in x], "y": [chart.format(float(one)) for one in y]}
        )
    frame = [round(box.x0 * width, 2), round(box.x1 * width, 2), round((1 - box.y1) * height, 2)]
    frame.append(round((1 - box.y0) * height, 2))
    value: dict[str, Any] = {"frame": frame, "span": [low, high], "over": chart.x_title, "lines": series}
    return json.dumps(value, ensure_ascii=True)


def _short(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else round(float(value), 6)

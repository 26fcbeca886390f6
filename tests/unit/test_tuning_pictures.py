"""The pictures of a search: what is in them, and that anything can be drawn."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from distft.config.search import SearchSection
from distft.runs import Run
from distft.tuning.pictures import (
    BEST,
    COLOURS,
    DOTS_PER_INCH,
    HEIGHT_INCHES,
    learning_curves,
    parallel_coordinates,
    sensible_limits,
    write_pictures,
)
from distft.tuning.trials import Status, Trial, trial_id

RATE, EPOCHS, SIZE = "train.learning_rate", "train.epochs", "train.batch_size"
NAMES = [RATE, EPOCHS, SIZE]
SEARCH = SearchSection.model_validate(
    {"space": {RATE: {"log_uniform": [1e-6, 1e-3]}, EPOCHS: {"choice": [1, 2, 3]}, SIZE: {"choice": [4, 8, 16]}}}
)


def trial(number: int, status: Status, *values: float, rate: float = 1e-4, epochs: int = 1) -> Trial:
    """One that was validated every 3,000 tokens."""
    those = tuple((3000 * (place + 1), value) for place, value in enumerate(values))
    params = {RATE: rate, EPOCHS: epochs, SIZE: 2 ** (number % 3 + 2)}
    return Trial(trial_id(number), params, status, tokens=3000 * len(values)).with_values(those, "min")


FEW = [
    trial(0, "finished", 3.3, 3.2, 3.15, rate=2e-5),
    trial(1, "stopped", 3.4, rate=1e-6, epochs=2),
    trial(2, "finished", 3.2, 3.1, 3.05, rate=3.1e-4, epochs=3),
    trial(3, "failed", rate=9e-4),
    trial(4, "running", 3.25, rate=5e-5, epochs=2),
    trial(5, "stopped", 3.5, rate=2e-6, epochs=3),
]


def many(count: int) -> list[Trial]:
    draw = random.Random(5)
    statuses: list[Status] = ["stopped", "stopped", "finished", "failed", "running"]
    return [
        trial(
            number,
            draw.choice(statuses),
            *(draw.gauss(3, 0.1) for _ in range(draw.randrange(4))),
            rate=10 ** draw.uniform(-6, -3),
            epochs=draw.choice([1, 2, 3]),
        )
        for number in range(count)
    ]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def pixels(path: Path) -> tuple[int, int]:
    """Width and height, as the head of a PNG file tells them."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_any_number_of_trials_can_be_drawn(tmp_path: Path, count: int) -> None:
    run = Run(tmp_path)
    write_pictures(run, SEARCH, many(count))
    written = [run.search / "learning-curves.png", run.search / "parallel-coordinates.png"]
    for path in written:
        assert pixels(path) == (8 * DOTS_PER_INCH, HEIGHT_INCHES * DOTS_PER_INCH)
        assert path.stat().st_size > 5_000
    assert sorted(run.search.iterdir()) == written


def test_trials_that_all_failed_can_be_drawn(tmp_path: Path) -> None:
    failed = [trial(number, "failed", rate=1e-5 * (number + 1)) for number in range(3)]
    write_pictures(Run(tmp_path), SEARCH, failed)
    figure = learning_curves(failed, "validation.loss", "min")
    assert legend(figure) == ["failed (3)"]
    assert figure.axes[0].texts[0].get_text() == "no trial was validated"


def test_the_legend_names_the_best_and_counts_the_others() -> None:
    best = "best: 002, learning_rate 3.1e-4, epochs 3, batch_size 16"
    assert legend(learning_curves(FEW, "validation.loss", "min")) == [
        "failed (1)",
        "stopped early (2)",
        "still running (1)",
        "finished (2)",
        best,
    ]
    drawn = parallel_coordinates(FEW, "validation.loss", "min", NAMES, {RATE})
    assert legend(drawn) == [f"{best}, validation.loss 3.050"]


def test_where_more_is_better_another_is_the_best() -> None:
    highest = [trial.with_values(trial.values, "max") for trial in FEW]
    assert legend(learning_curves(highest, "validation.accuracy", "max"))[-1].startswith("best: 005,")
    drawn = parallel_coordinates(highest, "validation.accuracy", "max", NAMES, {RATE})
    assert legend(drawn)[0].startswith("best: 005,")


def test_a_stopped_trial_is_grey_and_thinner_and_the_best_stands_out() -> None:
    figure = learning_curves(FEW, "validation.loss", "min")
    widths = {to_hex(line.get_color()).upper(): line.get_linewidth() for line in figure.axes[0].lines}
    assert widths[COLOURS["stopped"]] < widths[COLOURS["finished"]] < widths[BEST]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "training tokens"
    assert axes.get_ylabel() == "validation.loss (less is better)"


def test_a_logarithmic_setting_has_equal_decades() -> None:
    """The best's learning rate of 3.1e-4 between 1e-6 and 9e-4, by its place on the first axis."""
    figure = parallel_coordinates(FEW, "validation.loss", "min", NAMES, {RATE})
    heights = next(line for line in figure.axes[0].lines if line.get_color() == BEST).get_ydata()
    assert heights[0] == pytest.approx(math.log(3.1e-4 / 1e-6) / math.log(9e-4 / 1e-6))
    titles = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert titles == ["learning_rate\n(logarithmic)", "epochs", "batch_size", "validation.loss\n(less is better)"]
    even = parallel_coordinates(FEW, "validation.loss", "min", NAMES, ())
    heights = next(line for line in even.axes[0].lines if line.get_color() == BEST).get_ydata()
    assert heights[0] == pytest.approx((3.1e-4 - 1e-6) / (9e-4 - 1e-6))


def test_lines_through_one_discrete_value_do_not_cover_each_other() -> None:
    alike = [trial(number, "finished", 3 + number / 10, rate=1e-5 * (number + 1)) for number in range(6)]
    figure = parallel_coordinates(alike, "validation.loss", "min", [RATE, SIZE], {RATE})
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 3]
    assert len(drawn) == 6
    assert len({round(heights[1], 6) for heights in drawn}) == 6


def test_one_trial_that_diverged_does_not_flatten_the_others() -> None:
    figure = learning_curves([*FEW, trial(6, "stopped", 4e5)], "validation.loss", "min")
    low, high = figure.axes[0].get_ylim()
    assert low < 3.05 < 3.5 < high < 5
    assert figure.axes[0].texts[0].get_text() == "1 trial has values beyond this frame"
    assert not learning_curves(FEW, "validation.loss", "min").axes[0].texts


def test_limits_reach_from_the_best_to_the_last_sensible_value() -> None:
    assert sensible_limits([], "min") == (0.0, 1.0)
    assert sensible_limits([2.0, 2.0], "min") == (1.5, 2.5)
    assert sensible_limits([1.0, 2.0, 3.0, 4.0, 1e9], "min") == (1.0, 4.0)
    assert sensible_limits([-1e9, 1.0, 2.0, 3.0, 4.0], "max") == (1.0, 4.0)

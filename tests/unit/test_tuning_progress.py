"""How long a search will still take, how its trials are called, and what it came to."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from distft.config.search import SearchSection
from distft.tuning.labels import number, score, settings, short_names
from distft.tuning.progress import expected_tokens, seconds_left
from distft.tuning.summary import summary
from distft.tuning.trials import Status, Trial, trial_id


def trials(*those: tuple[Status, int], pace: float = 0.01) -> list[Trial]:
    """Trials of so many tokens, at a pace of so many seconds a token."""
    return [
        Trial(trial_id(place), {}, status, tokens=tokens, seconds=tokens * pace)
        for place, (status, tokens) in enumerate(those)
    ]


def test_nothing_is_known_before_the_first_tokens() -> None:
    assert seconds_left([], 4, 2, 1000) is None
    assert seconds_left(trials(("running", 0), ("running", 0)), 4, 2, 1000) is None
    assert seconds_left(trials(("failed", 0), ("running", 0)), 4, 2, 1000) is None
    assert seconds_left(trials(("running", 5), pace=0), 4, 2, 1000) is None


def test_nothing_is_left_when_all_have_ended() -> None:
    assert seconds_left(trials(("finished", 1000), ("failed", 0)), 2, 2, 1000) == 0.0


def test_trials_alike_take_as_long_as_those_before() -> None:
    """Two at a time, 10 s each: two of six are done, so 20 s are left."""
    assert seconds_left(trials(("finished", 1000), ("finished", 1000)), 6, 2, 1000) == pytest.approx(20)


def test_half_of_the_first_trials_is_known_to_be_half() -> None:
    assert seconds_left(trials(("running", 500), ("running", 500)), 4, 2, 1000) == pytest.approx(15)


def test_the_last_trial_has_no_other_to_share_its_work_with() -> None:
    """One of 10 s is left, whatever there is room for."""
    begun = trials(("finished", 1000), ("finished", 1000), ("finished", 1000), ("running", 0))
    assert seconds_left(begun[:3], 4, 2, 1000) == pytest.approx(10)
    assert seconds_left(begun, 4, 2, 1000) == pytest.approx(10)


def test_time_since_the_last_validation_counts() -> None:
    """Validated at 300 tokens, 3 s; now it is at 7 s, and 10 s are what such a trial takes."""
    running = replace(trials(("running", 300))[0], id="001", seconds=7.0)
    assert seconds_left([*trials(("finished", 1000)), running], 2, 2, 1000) == pytest.approx(3)
    late = replace(running, seconds=25.0)
    assert seconds_left([*trials(("finished", 1000)), late], 2, 2, 1000) == 0.0


def test_a_trial_that_still_runs_counts_for_what_it_has_shown() -> None:
    """One of two was stopped at 100; the other is beyond 100, and nothing was stopped later."""
    begun = trials(("stopped", 100), ("running", 400))
    assert expected_tokens(begun, 400, 1000) == 600
    assert expected_tokens(begun, 0, 1000) == pytest.approx(100 + 0.5 * 900)
    assert expected_tokens(trials(("stopped", 100)), 0, 1000) == 100
    assert expected_tokens([], 0, 1000) == 1000


def test_expected_tokens_are_the_mean_where_all_have_ended() -> None:
    draw = random.Random(3)
    ends = [draw.choice([100, 300, 900, 1000]) for _ in range(50)]
    assert expected_tokens(trials(*(("stopped", end) for end in ends)), 0, 1000) == pytest.approx(sum(ends) / 50)


def test_the_estimate_of_a_search_with_early_stopping_is_near_from_a_third_on() -> None:
    """Simulated: 60 trials on 3 places, two thirds stopped at each rung, a token a second, told of at rungs."""
    draw, most = random.Random(11), 900

    def ended(place: int, begin: float, end: float) -> Trial:
        return Trial(trial_id(place), {}, "stopped", tokens=int(end - begin), seconds=end - begin)

    def running(place: int, begin: float, now: float) -> Trial:
        told = max(rung for rung in (0, 100, 300) if rung <= now - begin)
        return Trial(trial_id(place), {}, "running", tokens=told, seconds=now - begin)

    ends = [100 if draw.random() < 2 / 3 else 300 if draw.random() < 2 / 3 else most for _ in range(60)]
    free, spans = [0.0] * 3, []
    for end in ends:
        begin = min(free)
        free[free.index(begin)] = begin + end
        spans.append((begin, begin + end))
    whole = max(free)
    for share in (0.35, 0.5, 0.7, 0.9):
        now = share * whole
        begun = [
            ended(place, begin, end) if end <= now else running(place, begin, now)
            for place, (begin, end) in enumerate(spans)
            if begin <= now
        ]
        estimate = seconds_left(begun, 60, 3, most)
        assert estimate is not None
        assert abs(estimate - (whole - now)) < 0.2 * whole


def test_names_are_as_short_as_they_can_be_told_apart() -> None:
    names = ["train.learning_rate", "train.schedule.warmup", "model.adapter.rank", "a.rank"]
    assert list(short_names(names).values()) == ["learning_rate", "warmup", "adapter.rank", "a.rank"]
    assert short_names(["rank", "model.rank"]) == {"rank": "rank", "model.rank": "model.rank"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (32, "32"),
        (4096, "4,096"),
        (0.0, "0"),
        (0.03, "0.03"),
        (3.1e-4, "3.1e-4"),
        (1.2345e-5, "1.23e-5"),
        (0.001, "0.001"),
        (0.12345, "0.123"),
        (-2.5, "-2.5"),
        (123456.0, "1.23e5"),
        (999.7, "1e3"),
    ],
)
def test_settings_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_objectives_have_four_digits_and_settings_are_named() -> None:
    assert [score(value) for value in (3.4, 3.41249, 0.0, 1234.5, None)] == ["3.400", "3.412", "0.000", "1234", "-"]
    assert settings({"train.learning_rate": 3.1e-4, "train.epochs": 2}) == "learning_rate 3.1e-4, epochs 2"


def test_the_summary_has_the_best_and_what_was_saved() -> None:
    section = SearchSection.model_validate({"space": {"train.epochs": {"choice": [1, 2]}}})
    begun = [
        Trial("000", {"train.epochs": 1}, "finished", tokens=1000, objective=3.5, seconds=10.25),
        Trial("001", {"train.epochs": 2}, "stopped", tokens=500, objective=3.25, seconds=5.0),
        Trial("002", {"train.epochs": 2}, "failed", tokens=0),
    ]
    whole = {"000": 1000, "001": 2000, "002": 2000}
    found = summary(section, begun, importance={"train.epochs": 1.0}, whole_tokens=whole)
    assert json.loads(json.dumps(found)) == {
        "metric": "validation.loss",
        "mode": "min",
        "best": {"id": "001", "params": {"train.epochs": 2}, "objective": 3.25},
        "trials": {"finished": 1, "stopped": 1, "failed": 1},
        "tokens": 1500,
        "tokens_without_stopping": 5000,
        "seconds_of_trials": 15.2,
        "importance": {"train.epochs": 1.0},
    }
    assert summary(section, begun, importance={})["tokens_without_stopping"] is None
    assert summary(section, begun[2:], importance={})["best"] is None

"""The pure decisions of a search: which settings come next, where trials are compared, and which keys mattered."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.config import Job
from distft.data.order import Order
from distft.tuning.importance import importance
from distft.tuning.rungs import most_tokens, rungs
from distft.tuning.space import ask, own_params, space_points, trial_job
from distft.tuning.trials import Params, Trial, read_trials, trial_id, write_trials
from tests.unit.test_config_rules import VALUES

SPACE: dict[str, Any] = {
    "train.learning_rate": {"log_uniform": [1e-6, 1e-3]},
    "train.epochs": {"choice": [1, 2, 3]},
    "train.weight_decay": {"uniform": [0.0, 0.1]},
    "train.batch_size": {"int_uniform": [8, 64]},
}
SMALL: dict[str, Any] = {"train.epochs": {"choice": [1, 2, 3]}, "train.batch_size": {"int_uniform": [31, 33]}}


def job_with(space: dict[str, Any], *, seed: int = 17, train: dict[str, Any] | None = None, **search: Any) -> Job:
    return Job.from_values({**VALUES, "seed": seed, "train": train or {}, "search": {"space": space, **search}}, ".")


def ended(number: int, params: Params, value: float, status: str = "finished") -> Trial:
    return Trial(trial_id(number), params, status, 10, 1000, value, values=((1000, value),))  # type: ignore[arg-type]


def play(job: Job, objective: Callable[[Params], float], trials: int) -> list[Trial]:
    """A search, one trial after the other; every third is stopped early."""
    known: list[Trial] = []
    while len(known) < trials and (params := ask(job, len(known), known)) is not None:
        status = "stopped" if len(known) % 3 == 2 else "finished"
        known.append(ended(len(known), params, objective(params), status))
    return known


def holds(space: dict[str, Any], params: Params) -> bool:
    """Whether each value lies in its space, with the type that the space gives it."""

    def one(key: str) -> bool:
        (kind, given), value = *space[key].items(), params[key]
        if kind in {"choice", "grid"}:
            return value in given
        return given[0] <= value <= given[1] and isinstance(value, int if kind == "int_uniform" else float)

    return list(params) == list(space) and all(one(key) for key in space)


# --- what comes next ---


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    algorithm=st.sampled_from(["optuna", "random"]),
    outcomes=st.lists(
        st.tuples(st.sampled_from(["finished", "stopped", "running", "failed"]), st.floats(-5, 5)), max_size=9
    ),
)
def test_the_next_settings_lie_in_the_space_and_follow_from_what_is_known_alone(
    seed: int, algorithm: str, outcomes: list[tuple[str, float]]
):
    job, known = job_with(SPACE, seed=seed, algorithm=algorithm), list[Trial]()
    for number, (status, value) in enumerate(outcomes):
        params = ask(job, number, known)
        assert params is not None
        assert holds(SPACE, params)
        trial = ended(number, params, value, status)
        known.append(replace(trial, objective=None, values=()) if status == "failed" else trial)
    again = Job.from_values(json.loads(json.dumps(job.dump())), ".")
    assert ask(job, len(known), known) == ask(again, len(known), known[::-1])


def test_a_search_goes_on_from_its_list_of_trials_as_if_it_had_never_stopped(tmp_path):
    job = job_with(SPACE, trials=12)
    whole = play(job, lambda params: math.log(params["train.learning_rate"]) ** 2, 12)
    write_trials(tmp_path / "trials.jsonl", whole[:7])
    read = read_trials(tmp_path / "trials.jsonl")
    for number in range(7, 12):
        assert ask(job, number, read) == whole[number].params
        read.append(whole[number])


def test_another_seed_or_another_number_gives_other_settings():
    for algorithm in ("optuna", "random"):
        drawn = [
            ask(job_with(SPACE, seed=seed, algorithm=algorithm), number, []) for seed in (1, 2) for number in (1, 2, 3)
        ]
        assert len({str(params) for params in drawn}) == 6


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
def test_the_first_trial_has_the_job_s_own_settings_where_the_space_holds_them(algorithm: str):
    job = job_with(SPACE, algorithm=algorithm)
    own = {"train.learning_rate": 2e-5, "train.epochs": 1, "train.weight_decay": 0.0, "train.batch_size": 32}
    assert own_params(job) == own
    assert isinstance(own_params(job)["train.epochs"], int)  # type: ignore[index]
    assert ask(job, 0, []) == own
    assert trial_job(job, own).dump()["train"] == job.dump()["train"]
    outside = job_with(SPACE, algorithm=algorithm, train={"learning_rate": 2e-3})
    assert own_params(outside) is None
    assert ask(outside, 0, []) != own
    for space in ({"train.micro_batch_size": {"choice": [4, 8]}}, {"train.patience": {"int_uniform": [1, 3]}}):
        assert own_params(job_with(space)) is None  # auto and null are no numbers


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_space_that_can_be_counted_is_used_up_without_trying_anything_twice(algorithm: str, seed: int):
    job = job_with(SMALL, seed=seed, algorithm=algorithm, trials=20)
    trials = play(job, lambda params: params["train.epochs"] * params["train.batch_size"], 20)
    assert space_points(job.search) == 9  # type: ignore[arg-type]
    assert sorted(tuple(trial.params.values()) for trial in trials) == [*product((1, 2, 3), (31, 32, 33))]


def test_a_space_that_cannot_be_counted_has_no_number_of_points():
    assert space_points(job_with(SPACE).search) is None  # type: ignore[arg-type]
    huge = job_with({"train.steps": {"int_uniform": [1, 10**12]}}, train={"steps": 5}, algorithm="random")
    assert space_points(huge.search) == 10**12  # type: ignore[arg-type]
    assert ask(huge, 3, []) != ask(huge, 4, [])


def test_a_grid_is_tried_in_order_and_no_further_than_trials_allow():
    space = {"train.epochs": {"grid": [1, 3]}, "train.batch_size": {"choice": [64, 16]}}
    job = job_with(space, algorithm="grid")
    drawn = [ask(job, number, []) for number in range(5)]
    order = [{"train.epochs": epochs, "train.batch_size": size} for epochs in (1, 3) for size in (64, 16)]
    assert drawn == [*order, None]
    assert ask(job_with(space, algorithm="grid", trials=3), 3, []) is None


def test_a_few_trials_already_cover_the_space():
    """Five drawn by chance alone leave out an order of magnitude in two of five searches."""
    for seed in range(10):
        job = job_with({"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}}, seed=seed)
        rates = [math.log10(ask(job, number, [])["train.learning_rate"]) for number in range(1, 6)]  # type: ignore[index]
        assert {int(rate + 6) for rate in rates} == {0, 1, 2}


BEST = 1.4e-4


def distance(params: Params) -> float:
    """How far a learning rate is from the planted best one, in factors of e, squared."""
    return math.log(params["train.learning_rate"] / BEST) ** 2


def test_a_planted_learning_rate_is_found_and_better_than_by_chance():
    factors: dict[str, list[float]] = {}
    for algorithm, seed in product(("optuna", "random"), range(5)):
        trials = play(job_with(SPACE, seed=seed, algorithm=algorithm, trials=20), distance, 20)
        factors.setdefault(algorithm, []).append(math.exp(math.sqrt(min(trial.objective or 0.0 for trial in trials))))
    assert max(factors["optuna"]) < 2
    assert median(factors["optuna"]) < median(factors["random"])


def test_beside_a_trial_that_runs_something_else_is_tried():
    job = job_with({"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}}, trials=20)
    known = play(job, distance, 8)
    params = ask(job, 8, known)
    assert params is not None
    beside = Trial(trial_id(8), {"train.learning_rate": params["train.learning_rate"] * 1.0003})
    assert ask(job, 8, [*known, beside]) != params


def test_more_is_better_where_the_job_says_so():
    up = {"metric": "validation.accuracy", "mode": "max"}
    values = {**VALUES, "task": {"kind": "classification"}, "search": {"space": SPACE, "objective": up, "trials": 20}}
    trials = play(Job.from_values(values, "."), lambda params: -distance(params), 20)
    assert max(trial.objective or -9.0 for trial in trials) > -(math.log(2) ** 2)


def test_nothing_of_optuna_is_said_and_it_is_loaded_only_when_asked():
    code = (
        "import sys; from tests.unit.test_tuning import *; import distft.tuning.rungs; "
        "assert 'optuna' not in sys.modules and 'ray' not in sys.modules and 'torch' not in sys.modules; "
        "play(job_with(SPACE, trials=8), distance, 8); assert 'optuna' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- a trial's job ---


def test_a_trial_s_job_is_the_job_with_its_settings_in_their_places(tmp_path):
    job = Job.from_values(
        {**VALUES, "name": "century", "cluster": {"workers": {"min": 1, "max": 4}}, "search":
         {"space": SPACE, "workers_per_trial": 2}}, tmp_path,
    )  # fmt: skip
    trial = trial_job(job, {"train.learning_rate": 1e-4, "train.epochs": 3, "train.schedule.warmup": 0.5})
    assert (trial.name, trial.folder, trial.search, trial.cluster.workers) == ("century", job.folder, None, 2)
    assert (trial.train.learning_rate, trial.train.epochs, trial.train.schedule.warmup) == (1e-4, 3.0, 0.5)
    assert trial_job(job, {}, workers=8).cluster.workers == 8
    assert trial_job(job, {}, workers=4).dump() == {**job.dump(), "search": None, "cluster": trial.dump()["cluster"]
                                                    | {"workers": 4}}  # fmt: skip


# --- where trials are compared ---


@given(most=st.integers(1, 10**12), grace=st.floats(1e-4, 1), reduction=st.floats(1.5, 10))
def test_rungs_ascend_from_grace_to_below_the_most(most: int, grace: float, reduction: float):
    levels = rungs(most, grace, reduction)
    assert list(levels) == sorted(set(levels))
    assert all(1 <= level < most for level in levels)
    first = math.ceil(grace * most)
    assert levels[:1] == ((first,) if first < most else ())
    assert not levels or levels[-1] * reduction >= most - 1


def test_the_rungs_of_a_usual_search():
    assert rungs(90_000, 0.1, 3) == (9_000, 27_000, 81_000)
    assert rungs(100, 1.0, 3) == ()
    assert rungs(3, 0.1, 1.1) == (1, 2)


@pytest.mark.parametrize(
    ("space", "train", "most"),
    [
        ({"train.epochs": {"choice": [3, 0.5]}, "train.batch_size": {"choice": [4, 8]}}, {}, 3_000),
        ({"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}}, {"epochs": 0.25}, 260),  # 26 of 101 rows
        ({"train.steps": {"int_uniform": [5, 10]}, "train.batch_size": {"choice": [8, 101]}}, {"steps": 3}, 10_000),
        ({"train.batch_size": {"choice": [16, 202]}}, {"steps": 2}, 4_000),
    ],
)
def test_the_most_tokens_are_those_of_the_longest_corner_of_the_space(
    space: dict[str, Any], train: dict[str, Any], most: int
):
    job = job_with(space, train=train)
    found = most_tokens(job, rows=101, tokens=1_000)
    assert abs(found - most) <= 3
    for number in range(6):
        rows = Order.of(trial_job(job, ask(job, number, []) or {}), 101).total_rows
        assert rows * 1_000 / 101 <= found


def test_longer_rows_make_more_tokens_of_as_many_steps():
    space = {"data.max_tokens": {"choice": [512, 2048]}}
    by_steps = Job.from_values(
        {**VALUES, "data": {"source": "a.txt", "overlong": "split"}, "train": {"steps": 4}, "search": {"space": space}},
        ".",
    )
    assert most_tokens(by_steps, rows=32, tokens=1_000) == 4 * 2 * 1_000


# --- what mattered ---


def test_the_key_that_mattered_is_named_first():
    job = job_with(SPACE, trials=16)
    shares = importance(job, play(job, distance, 16))
    assert next(iter(shares)) == "train.learning_rate"
    assert shares.keys() == SPACE.keys()
    assert sum(shares.values()) == pytest.approx(1)
    other = job_with(SPACE, trials=16, seed=1)
    assert next(iter(importance(other, play(other, distance, 16)))) == "train.learning_rate"


def test_nothing_is_said_of_too_few_trials():
    job = job_with(SPACE, trials=16)
    trials = play(job, distance, 8)
    assert importance(job, trials)
    assert importance(job, [*trials[:7], replace(trials[7], status="failed", objective=None)]) == {}
    assert importance(job, []) == {}

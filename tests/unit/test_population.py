"""Population based training: who goes on from whom, and that it comes out the same however the driver fares."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.checkpoint import signing_key, storage_of
from distft.config import Job
from distft.orchestrate.data import Data
from distft.orchestrate.listener import Silent
from distft.orchestrate.search.population import Population
from distft.orchestrate.search.setup import SearchSetup
from distft.runs import Run, append_line, read_lines, training_curve
from distft.train.folder import begin, job_of
from distft.tuning.population import exploits, explore
from distft.tuning.rungs import even_rungs
from distft.tuning.space import ask, section
from distft.tuning.trials import Trial, read_trials, trial_id
from tests.unit.test_checkpoint import write
from tests.unit.test_tuning import holds, job_with

SPACE: dict[str, Any] = {
    "train.learning_rate": {"log_uniform": [1e-5, 1e-2]},
    "train.weight_decay": {"choice": [0.0, 0.2, 0.1]},
}
RUNGS = (100, 200, 300)
STEP_TOKENS, LAST_STEP = 50, 8


def pbt(**search: Any) -> Job:
    return job_with(SPACE, scheduler={"kind": "pbt", "grace": 0.25}, trials=5, **search)


def population_of(job: Job, values: list[float | None]) -> list[Trial]:
    """Trials that have come to a rung with these objectives."""
    found = []
    for number, value in enumerate(values):
        params = ask(job, number, [])
        assert params is not None
        at = ((100, value),) if value is not None else ()
        found.append(Trial(trial_id(number), params, values=at, turns=1))
    return found


# --- the decision ---


def test_a_population_is_compared_at_even_tokens() -> None:
    assert even_rungs(1000, 0.25) == (250, 500, 750)
    assert even_rungs(1000, 0.3) == (300, 600, 900)
    assert even_rungs(1000, 1.0) == ()
    assert even_rungs(3, 0.1) == (1, 2)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    values=st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=1, max_size=5),
    mode=st.sampled_from(["min", "max"]),
)
def test_the_poor_quarter_goes_on_from_the_good_quarter(seed: int, values: list[float | None], mode: str) -> None:
    asked_for = section(pbt())
    objective = asked_for.objective.model_copy(update={"mode": mode})
    search = asked_for.model_copy(update={"objective": objective})
    population = population_of(pbt(), values)
    found = exploits(search, seed, 0, population)
    shuffled = random.Random(seed).sample(population, len(population))
    assert exploits(search, seed, 0, shuffled) == found, "in whatever order they come"
    count = -(-len(values) // 4) if len(values) > 1 else 0
    assert len(found) == (count if any(value is not None for value in values) else 0)
    sign, by_id = (1 if mode == "min" else -1), {trial.id: trial for trial in population}

    def rank(name: str) -> float:
        return sign * by_id[name].values[-1][1] if by_id[name].values else float("inf")

    for poor, (source, params) in found.items():
        assert poor != source
        assert source not in found
        assert rank(source) <= rank(poor)
        assert by_id[source].values
        assert params != by_id[source].params
        assert holds(SPACE, params)
    others = [rank(trial.id) for trial in population if trial.id not in found]
    assert not found or max(others) <= min(rank(poor) for poor in found)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_settings_are_perturbed_or_drawn_anew(seed: int) -> None:
    search = section(pbt())
    before = {"train.learning_rate": 1e-3, "train.weight_decay": 0.1}
    seen = [explore(search, before, random.Random(f"{seed} {number}")) for number in range(60)]
    assert before not in seen
    rates = [params["train.learning_rate"] for params in seen]
    assert {8e-4, 1.2e-3} <= set(rates)
    assert 0.05 < sum(rate not in (8e-4, 1.2e-3) for rate in rates) / len(rates) < 0.55
    assert {params["train.weight_decay"] for params in seen} <= {0.0, 0.1, 0.2}


def test_at_the_end_of_every_range_settings_still_change() -> None:
    search, ends = section(pbt()), {"train.learning_rate": 1e-2, "train.weight_decay": 0.2}
    assert all(explore(search, ends, random.Random(seed)) != ends for seed in range(200))


# --- the driver ---


class Dies(Exception):
    pass


class Mortal(Silent):
    """A listener with whom the driver dies, at the so-manieth exploit."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    def note(self, text: str) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Dies(text)


def opened(folder: Path, capacity: int = 1, listener: Silent | None = None) -> Population:
    setup = SearchSetup(pbt(), Run(folder / "run"), Data(folder, folder), {"CPU": 1.0}, RUNGS, 10**9, folder)
    return Population(setup, lambda: capacity, 400, listener or Silent())


def take_turn(folder: Path, population: Population, trial: Trial, *, told: bool = True) -> None:
    """Trains as a trial's actor does: a loss that its weights and settings make, a checkpoint where it stops."""
    run, until = Run(folder / "run" / "search" / "trials" / trial.id), population.until(trial)
    job = population._setup.trial_job(trial.params)
    if not run.job.exists():
        begin(job, run)
    assert job_of(run).train == job.train, "its folder tells its settings of now"
    storage = storage_of(job, run)
    key = signing_key(run, storage)
    curve = training_curve(run.metrics)
    loss, step = (curve[-1]["loss"], curve[-1]["step"]) if curve else (10.0, 0)
    last = LAST_STEP if until is None else until // STEP_TOKENS
    while step < last:
        step, loss = step + 1, loss * (1 - 30 * trial.params["train.learning_rate"])
        line = {"kind": "train", "step": step, "steps": LAST_STEP, "tokens": STEP_TOKENS, "loss": loss}
        append_line(run.metrics, line)
    append_line(run.metrics, {"kind": "validation", "step": step, "loss": loss})
    run.row_losses.write_bytes(b"\0" * 4 * step)
    write(storage, step, key=key)
    population.validated(trial.id, step * STEP_TOKENS, step, loss)
    if told:
        population.end(trial.id, "finished") if until is None else population.leave(trial.id, turn_ended=True)


def play(folder: Path, capacity: int = 1) -> list[Trial]:
    population, running, turns = opened(folder, capacity), list[Trial](), 0
    assert population.turns == 5 * 4
    try:
        while True:
            while (trial := population.next()) is not None:
                running.append(trial)
            assert running, "somebody has a turn"
            assert len(running) <= capacity
            take_turn(folder, population, running.pop(), told=True)
            turns += 1
    except StopIteration:
        pass
    assert turns == 5 * 4
    assert population.turns == population.to_come == 0
    return population.all


def timeless(trials: list[Trial]) -> list[Trial]:
    return [replace(trial, seconds=0.0, checkpoint=None) for trial in trials]


def test_trials_take_turns_and_the_poor_go_on_from_the_good(tmp_path: Path) -> None:
    trials = play(tmp_path)
    assert [trial.status for trial in trials] == ["finished"] * 5
    assert sum(len(trial.exploits) for trial in trials) == 2 * len(RUNGS), "two of five at each rung"
    for trial in trials:
        run = Run(tmp_path / "run" / "search" / "trials" / trial.id)
        curve = training_curve(run.metrics)
        assert [line["step"] for line in curve] == list(range(1, LAST_STEP + 1))
        assert (trial.steps, trial.tokens) == (LAST_STEP, LAST_STEP * STEP_TOKENS)
        assert [value for tokens, value in trial.values] == [
            line["loss"] for line in curve if line["step"] * STEP_TOKENS in (*RUNGS, 400)
        ], "what is told of it is of the model that it has"
        events = [line for line in read_lines(run.metrics) if line.get("event") == "exploit"]
        if trial.exploits:
            assert events[-1]["settings"] == trial.params
            assert events[-1]["trial"] == trial.exploits[-1].trial
            assert events[-1]["step"] == trial.exploits[-1].step
    assert trials == read_trials(tmp_path / "run" / "search" / "trials.jsonl")


def test_what_comes_of_it_does_not_depend_on_how_many_run_at_once(tmp_path: Path) -> None:
    assert timeless(play(tmp_path / "one")) == timeless(play(tmp_path / "three", capacity=3))


@pytest.mark.parametrize("dies_at", [0, 1])
def test_a_driver_that_dies_at_any_time_changes_nothing(tmp_path: Path, dies_at: int) -> None:
    """After each turn; before a turn that ended was told; and in the middle of the exploits, before or after one."""
    whole, folder = play(tmp_path / "whole"), tmp_path / "parts"
    mortal, deaths = Mortal(dies_at), 0
    for turn in range(200):
        population = opened(folder, listener=mortal)
        try:
            trial = population.next()
        except Dies:
            mortal, deaths = Mortal(dies_at if deaths < 2 else None), deaths + 1
            continue
        except StopIteration:
            break
        assert trial is not None
        take_turn(folder, population, trial, told=turn % 3 != 0)
    assert deaths == 3
    assert timeless(opened(folder).all) == timeless(whole)
    curves = [
        [training_curve(Run(place / "run" / "search" / "trials" / trial.id).metrics) for trial in whole]
        for place in (folder, tmp_path / "whole")
    ]
    assert curves[0] == curves[1]


def test_a_trial_that_failed_is_waited_for_no_more(tmp_path: Path) -> None:
    population = opened(tmp_path, capacity=5)
    begun = [population.next() for _ in range(5)]
    for trial in begun[:4]:
        assert trial is not None
        take_turn(tmp_path, population, trial)
    assert population.next() is None
    population.end("004", "failed", "it raised")
    following = population.next()
    assert following is not None
    assert following.passed == 1
    assert all(trial.passed == 1 for trial in population.all[:4])
    assert population.all[4].exploits == ()

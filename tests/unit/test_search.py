"""What the driver of a search keeps and decides: which trial comes next, which is stopped, whose checkpoints stay."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.config import Job
from distft.errors import JobError
from distft.orchestrate.data import Data
from distft.orchestrate.listener import Silent
from distft.orchestrate.search.setup import SearchSetup
from distft.orchestrate.search.trials import Trials
from distft.orchestrate.search.tuner import scheduler_of
from distft.runs import Run, append_line
from distft.train.folder import begin, run_folder
from distft.tuning.progress import SearchProgress
from distft.tuning.rungs import rungs
from distft.tuning.space import section
from distft.tuning.trials import Trial, read_trials
from tests.unit.test_tuning import job_with

RATES: dict[str, Any] = {"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}}


class Hearing(Silent):
    def __init__(self) -> None:
        self.told: list[SearchProgress] = []

    def trials(self, progress: SearchProgress) -> None:
        self.told.append(progress)


def trials_in(folder: Path, job: Job, capacity: int = 1) -> tuple[Trials, Hearing]:
    run, hearing = Run(folder / "run"), Hearing()
    setup = SearchSetup(job, run, Data(folder, folder), {"CPU": 1.0}, (100, 300, 900), 10**9, folder)
    return Trials(setup, lambda: capacity, 1000, hearing), hearing


def log(folder: Path, trial: str, steps: int, tokens: int) -> None:
    """What a trial's training leaves."""
    for step in range(1, steps + 1):
        line = {"kind": "train", "step": step, "steps": 10, "tokens": tokens}
        append_line(folder / "run" / "search" / "trials" / trial / "metrics.jsonl", line)


def test_no_more_trials_begin_than_there_is_room_for(tmp_path: Path) -> None:
    trials, hearing = trials_in(tmp_path, job_with(RATES, trials=3), capacity=2)
    one, two = trials.next(), trials.next()
    assert one is not None
    assert two is not None
    assert trials.next() is None
    trials.end(one.id, "stopped")
    three = trials.next()
    assert three is not None
    assert [trial.id for trial in trials.all] == ["000", "001", "002"]
    trials.end(two.id, "finished")
    trials.end(three.id, "failed", "it raised")
    with pytest.raises(StopIteration):
        trials.next()
    assert trials.to_come == 0
    assert [trial.status for trial in read_trials(tmp_path / "run" / "search" / "trials.jsonl")] == [
        "stopped",
        "finished",
        "failed",
    ]
    assert hearing.told[-1].trials[2].reason == "it raised"


def test_a_space_that_is_used_up_needs_fewer_trials(tmp_path: Path) -> None:
    trials, hearing = trials_in(tmp_path, job_with({"train.epochs": {"choice": [1, 2]}}, trials=16))
    trials.next()
    assert hearing.told[-1].of == 2


def test_what_a_driver_left_half_done_is_taken_up_first(tmp_path: Path) -> None:
    job = job_with(RATES, trials=3)
    before, _ = trials_in(tmp_path, job)
    first = before.next()
    assert first is not None
    before.validated(first.id, 120, 2, 5.0)
    after, _ = trials_in(tmp_path, job)
    assert after.to_come == 3
    again = after.next()
    assert again is not None
    assert (again.id, again.params, again.values) == (first.id, first.params, ())
    after.validated(again.id, 120, 2, 5.0)
    after.validated(again.id, 120, 2, 5.0)  # as a trial does that was started again
    after.validated(again.id, 310, 4, 4.0)
    log(tmp_path, again.id, 10, 50)
    after.end(again.id, "finished")
    (ended,) = after.ended
    assert ended.values == ((120, 5.0), (310, 4.0))
    assert (ended.objective, ended.steps, ended.tokens) == (4.0, 10, 500)
    assert after.to_come == 2


def test_settings_follow_from_the_trials_known_whoever_asks(tmp_path: Path) -> None:
    """The same search with a driver that dies after each trial."""
    job = job_with(RATES, trials=8)
    one, _ = trials_in(tmp_path / "one", job)
    params = []
    for number in range(8):
        other, _ = trials_in(tmp_path / "other", job)
        for trials in (one, other):
            trial = trials.next()
            assert trial is not None
            params.append(trial.params)
            trials.validated(trial.id, 1000, 10, 3.0 + (number * 7) % 5)
            trials.end(trial.id, "finished")
    assert params[0::2] == params[1::2]


def test_a_search_is_resumed_as_it_was(tmp_path: Path) -> None:
    """With other settings, or compared otherwise, the trials of before would say nothing."""
    job = job_with(RATES, trials=4)
    begin(job, run_folder(job, tmp_path, "one", resume=False))
    assert run_folder(job_with(RATES, trials=8, workers_per_trial=2), tmp_path, "one", resume=True).name == "one"
    other = {"train.learning_rate": {"log_uniform": [1e-6, 1e-2]}}
    for changed, part in ((job_with(other), "space"), (job_with(RATES, algorithm="random"), "algorithm")):
        with pytest.raises(JobError, match=rf"has changed since this run began, in: search\.{part}\n"):
            run_folder(changed, tmp_path, "one", resume=True)
    with pytest.raises(JobError, match="in: train"):
        run_folder(job_with(RATES, train={"weight_decay": 0.5}), tmp_path, "one", resume=True)


class Known:
    def __init__(self, name: str) -> None:
        self.trial_id = name


@settings(deadline=None, max_examples=50)  # the first call imports Ray Tune
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.sampled_from(["asha", "median"]))
def test_a_scheduler_that_is_made_again_stops_the_same_trials(seed: int, cut: int, kind: str) -> None:
    """Of a resumed search: it knows of the trials of before from their values alone."""
    search = section(job_with(RATES, scheduler={"kind": kind}))
    levels, draw = rungs(1000, 0.1, 3), random.Random(seed)
    curves = [[(tokens, draw.random()) for tokens in (*levels, 1000)] for _ in range(12)]

    def decided(scheduler: Any, numbers: range, past: list[Trial]) -> list[Trial]:
        for number in numbers:
            trial, told, status = Known(f"trial-{number}"), [], "finished"
            scheduler.on_trial_add(None, trial)
            for tokens, value in curves[number]:
                told.append((tokens, value))
                result = {"tokens": tokens, "value": value}
                if tokens == 1000:
                    scheduler.on_trial_complete(None, trial, result)
                elif scheduler.on_trial_result(None, trial, result) == "STOP":
                    status = "stopped"
                    break
            past.append(Trial(f"{number:03d}", {}, status, values=tuple(told)))  # type: ignore[arg-type]
        return past

    whole = decided(scheduler_of(search, levels, 1000, []), range(12), [])
    parts = decided(scheduler_of(search, levels, 1000, []), range(cut), [])
    parts = decided(scheduler_of(search, levels, 1000, parts), range(cut, 12), parts)
    assert parts == whole
    assert kind == "median" or any(trial.status == "stopped" for trial in whole)

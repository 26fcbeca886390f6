"""``--set dotted.key=value``."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import Bounds, InvalidJob, Job

VALUES = {
    "model": {"source": "gpt2"},
    "task": {"kind": "language_modeling"},
    "data": {"source": "data/*.txt"},
    "train": {"max_grad_norm": 2.0, "batch_size": 8},
}


def load(*overrides: str) -> Job:
    return Job.from_values(VALUES, ".", overrides)


def refused(*overrides: str) -> list[str]:
    with pytest.raises(InvalidJob) as caught:
        load(*overrides)
    return [str(problem) for problem in caught.value.problems]


def test_values_are_yaml_and_the_last_one_stands():
    job = load(
        "train.batch_size=16",
        "train.batch_size = 64",
        "train.learning_rate=1e-4",
        "train.max_grad_norm=null",
        "train.steps=30",
        "checkpoint.every={steps: 5}",
        "data.source=[a.txt, b.txt]",
        "data.splits.test=0.2",
        "cluster.resources_per_worker.GPU=1",
        "track.tensorboard=false",
        'name="007"',
    )
    assert (job.train.batch_size, job.train.learning_rate, job.train.max_grad_norm) == (64, 1e-4, None)
    assert (job.train.steps, job.train.epochs) == (30, None)
    assert job.checkpoint.every.steps(1000) == 5
    assert job.data.source == ["a.txt", "b.txt"]
    assert (job.data.splits.test, job.data.splits.validation) == (0.2, 0.05)
    assert job.cluster.resources_per_worker == {"GPU": 1.0}
    assert not job.track.tensorboard
    assert job.name == "007"


def test_the_values_given_are_not_changed():
    load("train.batch_size=16", "zero.stage=2")
    assert VALUES["train"] == {"max_grad_norm": 2.0, "batch_size": 8}
    assert "zero" not in VALUES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("learning_rate=1", "learning_rate: unknown key; it belongs elsewhere: train.learning_rate"),
        ("train.batch_size=many", "train.batch_size: must be a whole number, not 'many'; meaning"),
        ("train.batch_size.x=1", "train.batch_size: must be a whole number, not {'x': 1}; meaning"),
        ("train.schedule.warmup=2", "train.schedule.warmup: must be at most 1, not 2; meaning"),
        ("train.micro_batch_size=9", "train.micro_batch_size: 9 rows on one worker are more than batch_size, 8"),
        ("model.source=", "model.source: must be text, not null"),
        ("model.source", "is no dotted.key=value; write it as --set train.learning_rate=1e-5"),
        ("=3", "is no dotted.key=value"),
        ("train..steps=3", "is no dotted.key=value"),
        ("data.source=[a, b", "a bracket is not closed; close it"),
        ("seed=!x 3", "seed: the tag !x means nothing in a job file; remove it"),
    ],
)
def test_a_wrong_setting_is_named_in_place_of_a_line(override: str, message: str):
    (line,) = refused(override)
    assert line.startswith(f"--set {override}  {message}")


def test_a_setting_mends_what_the_file_has_wrong(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("model: {source: gpt2}\ntask: {kind: x}\ndata: {source: 3}\ntrain: {batch_size: x, steps: y}\n")
    overrides = ["task.kind=language_modeling", "data.source=a.txt", "train.batch_size=z", "lr=3"]
    with pytest.raises(InvalidJob) as caught:
        Job.load(path, overrides)
    assert [(problem.line, problem.where, problem.key) for problem in caught.value.problems] == [
        (4, f"{path}:4", "train.steps"),
        (None, "--set train.batch_size=z", "train.batch_size"),
        (None, "--set lr=3", "lr"),
    ]


def test_workers_become_elastic_bound_by_bound():
    assert load("cluster.workers.min=2", "cluster.workers.max=4").cluster.workers == Bounds(min=2, max=4)
    (line,) = refused("cluster.workers.min=2")
    assert "cluster.workers.max: missing" in line


def test_what_a_search_varies_is_one_key_with_dots():
    job = load("search.space.train.learning_rate={log_uniform: [1e-6, 1e-3]}", "search.trials=3")
    assert job.search is not None
    assert job.search.space["train.learning_rate"].log_uniform == [1e-6, 1e-3]
    lines = refused("search.space.train.learning_rat={log_uniform: [1e-6, 1e-3]}")
    assert lines == [
        "--set search.space.train.learning_rat={log_uniform: [1e-6, 1e-3]}  search.space.train.learning_rat: "
        "is no number in the job file; did you mean train.learning_rate?"
    ]


@given(
    steps=st.integers(1, 10**9),
    rate=st.floats(1e-9, 1.0),
    text=st.from_regex(r"[a-z]{1,9}/[a-z*]{1,9}\.txt", fullmatch=True),
)
def test_what_is_set_is_what_the_job_holds(steps: int, rate: float, text: str):
    job = load(f"train.steps={steps}", f"train.learning_rate={rate!r}", f"data.source='{text}'")
    assert (job.train.steps, job.train.learning_rate, job.data.source) == (steps, rate, text)

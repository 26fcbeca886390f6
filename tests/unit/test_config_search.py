"""The search section: what is refused before a trial starts, and what it is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import InvalidJob, Job
from distft.config.keys import numbers
from distft.config.search_rules import IN_MID_RUN, MEASURED, SAME_FOR_ALL
from tests.unit.test_config_rules import VALUES, problems

RATES = "train.learning_rate: {log_uniform: [1e-6, 1e-3]}"
EPOCHS = "train.epochs: {choice: [1, 2]}"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"search={{space: {{{RATES}, {EPOCHS}, train.batch_size: {{choice: [16, 32, 64]}}}}}}"],
        [f"search={{space: {{{RATES}}}, algorithm: random, scheduler: {{kind: median}}, concurrent: 3}}"],
        [f"search={{space: {{{RATES}}}, scheduler: {{kind: pbt, grace: 0.25}}}}", "checkpoint.storage=/shared/runs"],
        [f"search={{space: {{{RATES}}}, scheduler: {{kind: none}}, promote: {{top: 2, workers: 8}}}}"],
        [f"search={{space: {{{RATES}}}, workers_per_trial: 2, promote: {{workers: 3}}}}"],
        [
            f"search={{space: {{{RATES}}}, workers_per_trial: 2, promote: {{workers: 4}}}}",
            "train.sequence_parallel_size=2",
            "cluster.workers=2",
        ],
        ["search={space: {train.epochs: {grid: [1, 2]}, train.batch_size: {choice: [16, 32]}}, algorithm: grid}"],
        ["search.space={train.epochs: {int_uniform: [1, 3]}, train.batch_size: {int_uniform: [8, 64]}}"],
        ["search.space={train.epochs: {uniform: [0.5, 2]}, train.batch_size: {choice: [16]}}"],
        ["search.space={train.steps: {choice: [10, 20]}}", "train.steps=5"],
        ["search.space={model.adapter.rank: {choice: [8, 16]}}", "model.adapter={kind: lora}"],
        ["search.space={train.weight_decay: {uniform: [0, 0.1]}, train.schedule.warmup: {uniform: [0, 0.2]}}"],
        # 64 is more than the job's own batch_size, but not than any that a trial has
        ["search.space={train.micro_batch_size: {choice: [4, 64]}, train.batch_size: {choice: [64, 128]}}"],
        ["search.space={data.max_tokens: {choice: [128, 256]}}", "data.overlong=split"],
        [
            f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.accuracy, mode: max}}}}",
            "task.kind=classification",
        ],
        [f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.perplexity}}}}"],
        [f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.loss}}}}", "task.kind=classification"],
    ],
)
def test_a_search_in_order_is_accepted_and_its_dump_too(overrides: list[str]):
    assert problems(*overrides) == {}
    job = Job.from_values(VALUES, ".", overrides)
    assert Job.from_values(job.dump(), ".").dump() == job.dump()


SPACES = [
    ("learning_rate: {choice: [1]}", "learning_rate", "did you mean train.learning_rate?"),
    ("lr: {choice: [1]}", "lr", "did you mean train.learning_rate?"),
    ("train.learning_rat: {choice: [1]}", "train.learning_rat", "did you mean train.learning_rate?"),
    ("zero.offload: {choice: [1]}", "zero.offload", "is no number in the job file"),
    ("seed: {choice: [1, 2]}", "seed", "it decides which rows are validation and test"),
    ("data.splits.test: {choice: [0.1, 0.2]}", "data.splits.test", "compared on the same rows; leave it out"),
    ("data.limit: {choice: [10, 20]}", "data.limit", "compared on the same rows"),
    ("evaluate.samples: {choice: [10, 20]}", "evaluate.samples", "what is scored is the same for all trials"),
    ("cluster.workers: {choice: [1, 2]}", "cluster.workers", "search.workers_per_trial says how many"),
    ("train.epochs: {}", "train.epochs", "needs exactly one of log_uniform, uniform, int_uniform, choice and grid; it "
     "has none"),
    ("train.epochs: {choice: [1], uniform: [1, 2]}", "train.epochs", "it has uniform or choice"),
    ("train.epochs: {uniform: [2, 1]}", "train.epochs.uniform", "[2, 1] is no range; it needs low < high"),
    ("train.epochs: {uniform: [2, 2]}", "train.epochs.uniform", "[2, 2] is no range; it needs low < high"),
    ("train.epochs: {log_uniform: [0, 1]}", "train.epochs.log_uniform", "it needs 0 < low < high"),
    ("train.weight_decay: {log_uniform: [-1, 1]}", "train.weight_decay.log_uniform", "[-1, 1] is no range"),
    ("train.batch_size: {int_uniform: [8, 4]}", "train.batch_size.int_uniform", "[8, 4] is no range"),
    ("train.batch_size: {int_uniform: [1.5, 3]}", "train.batch_size.int_uniform.0", "must be a whole number, not 1.5"),
    ("train.batch_size: {uniform: [1.5, 3]}", "train.batch_size.uniform", "draws fractions, and train.batch_size is a "
     "whole number; use int_uniform or choice"),
    ("train.batch_size: {log_uniform: [8, 64]}", "train.batch_size.log_uniform", "use int_uniform or choice"),
    ("train.batch_size: {choice: [8, 8.5]}", "train.batch_size.choice.1", "must be a whole number, not 8.5"),
    ("train.epochs: {choice: [-1, 2]}", "train.epochs.choice.0", "must be above 0, not -1"),
    ("train.learning_rate: {uniform: [0.1, 2]}", "train.learning_rate.uniform.1", "must be at most 1, not 2"),
    ("train.epochs: {choice: [1, 2, 1.0]}", "train.epochs.choice", "1 is listed 2 times; keep one"),
    ("train.epochs: {grid: [1, 2]}", "train.epochs.grid", "which optuna does not do; use choice, or algorithm: grid"),
    ("train.epochs: {chioce: [1, 2]}", "train.epochs.chioce", "unknown key; did you mean choice?"),
    ("train.epochs: {choice: [a, 2]}", "train.epochs.choice.0", "must be a whole number or a number, not 'a'"),
    ("train.steps: {choice: [10, 20]}", "train.steps", "given as train.epochs; search train.epochs, or give the job "
     "train.steps in its place"),
    ("model.adapter.rank: {choice: [8, 16]}", "model.adapter.rank", "the job has no model.adapter; give it"),
    ("train.micro_batch_size: {choice: [4, 64]}", "train.micro_batch_size", "64 rows on one worker are more than "
     "batch_size, 32 on all of them"),
    ("train.micro_batch_size: {choice: [4, 16]}, train.batch_size: {choice: [8, 32]}", "train.micro_batch_size",
     "16 rows on one worker are more than batch_size, 8"),
    ("train.validate_every: {uniform: [0.1, 1]}, train.validate_every.steps: {choice: [2]}", "train.validate_every",
     "train.validate_every.steps is another way to give it"),
]  # fmt: skip


@pytest.mark.parametrize(("space", "key", "message"), SPACES)
def test_a_space_that_cannot_be_searched_is_told_why(space: str, key: str, message: str):
    found = problems(f"search.space={{{space}}}")
    assert list(found) == [f"search.space.{key}"]
    assert message in found[f"search.space.{key}"]


OTHERS = [
    (["search.space={train.epochs: {choice: [2]}, train.batch_size: {choice: [8]}}"], "search.space",
     "holds one setting alone: there is nothing to search; give a key a range"),
    (["search.space={}"], "search.space", "must be a mapping with at least 1"),
    (["search={trials: 3}"], "search.space", "missing, and required"),
    ([f"search.space={{{EPOCHS}}}", "train.steps=9"], "search.space.train.epochs", "search train.steps, or give the "
     "job train.epochs in its place"),
    (["search.space={train.batch_size: {choice: [8, 32]}}", "train.micro_batch_size=16"],
     "search.space.train.batch_size", "with train.batch_size 8, train.micro_batch_size: 16 rows on one worker"),
    (["search.space={zero.stage: {choice: [0, 3]}}", "zero.offload=cpu"], "search.space.zero.stage",
     "with zero.stage 0, zero.offload: stage 0 shards nothing"),
    (["search.space={data.max_tokens: {choice: [64, 99]}}", "data.overlong=truncate"], "search.space.data.max_tokens",
     "trials would truncate other parts of the rows they are compared on"),
    (["search={space: {train.epochs: {uniform: [1, 2]}}, algorithm: grid}"], "search.space.train.epochs",
     "a grid cannot try every number between two; list them"),
    (["search={space: {train.epochs: {int_uniform: [1, 2]}}, algorithm: grid}"], "search.space.train.epochs",
     "a grid cannot try"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: test.loss}}}}"], "search.objective.metric",
     "the test split stays sealed; choose validation.loss or validation.perplexity"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: loss}}}}"], "search.objective.metric",
     "'loss' is no metric of the validation split; choose validation.loss"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.los}}}}"], "search.objective.metric",
     "is no metric of the validation split"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.accuracy}}}}"], "search.objective.metric",
     "accuracy means nothing for language_modeling"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.bits_per_byte}}}}"], "search.objective.metric",
     "measured on the finished model, not in training"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.macro_f1}}}}", "task.kind=classification"],
     "search.objective.metric", "choose validation.loss or validation.accuracy"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{mode: max}}}}"], "search.objective.mode",
     "max looks for the worst loss; smaller is better: write min"),
    ([f"search={{space: {{{EPOCHS}}}, objective: {{metric: validation.accuracy}}}}", "task.kind=classification"],
     "search.objective.mode", "larger is better: write max"),
    ([f"search={{space: {{{EPOCHS}}}}}", "data.splits.validation=0"], "search.objective", "no validation split"),
    ([f"search={{space: {{{EPOCHS}}}, trials: 4, promote: {{top: 5, workers: 2}}}}"], "search.promote.top",
     "5 are more than the 4 trials there are"),
    ([f"search={{space: {{{EPOCHS}}}, workers_per_trial: 2, promote: {{workers: 2}}}}"], "search.promote.workers",
     "2 are no more than the workers that trials have, 2"),
    ([f"search={{space: {{{EPOCHS}}}, scheduler: {{reduction: 1}}}}"], "search.scheduler.reduction", "above 1, not 1"),
    ([f"search={{space: {{{EPOCHS}}}}}", "train.sequence_parallel_size=2", "cluster.workers=2"],
     "train.sequence_parallel_size", "1 worker cannot be divided into groups of 2; choose a divisor of sea"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "message"), OTHERS)
def test_a_search_that_does_not_agree_with_itself_or_the_job_is_told_why(overrides: list[str], key: str, message: str):
    found = problems(*overrides)
    assert list(found) == [key]
    assert message in found[key]


def test_population_based_training_says_which_keys_it_could_not_change():
    found = problems(f"search={{space: {{{RATES}, {EPOCHS}}}, scheduler: {{kind: pbt}}}}")
    assert list(found) == ["search.space.train.epochs"]
    assert "cannot change in mid-run, as pbt would have it; search train.learning_rate" in found.popitem()[1]


def test_population_based_training_takes_two_trials_and_a_folder():
    found = problems(
        f"search={{space: {{{RATES}}}, scheduler: {{kind: pbt}}, trials: 1}}", "checkpoint.storage=s3://bucket/runs"
    )
    assert found["search.trials"] == "one trial is no population, as pbt needs; make it larger"
    assert found["checkpoint.storage"].endswith("which a bucket has no way to; name a folder")
    assert len(found) == 2


def test_every_bad_value_of_a_list_is_named_with_its_place():
    found = problems("search.space={train.epochs: {choice: [-1, 2, 0]}}")
    assert list(found) == ["search.space.train.epochs.choice.0", "search.space.train.epochs.choice.2"]


def test_a_judgement_that_rests_on_a_broken_value_is_not_passed():
    space = "search.space={train.micro_batch_size: {choice: [4, 64]}}"
    assert list(problems(space, "train.batch_size=x")) == ["train.batch_size"]


def test_tables_name_keys_and_metrics_that_exist():
    known = numbers(Job)
    assert set(IN_MID_RUN) <= set(known)
    for key in SAME_FOR_ALL:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key
    assert MEASURED.keys() == {"language_modeling", "classification", "generation"}


ends = st.floats(-10, 10, allow_nan=False) | st.integers(-10, 100)
spaces = st.fixed_dictionaries(
    {}, optional={
        "log_uniform": st.tuples(ends, ends).map(list), "uniform": st.tuples(ends, ends).map(list),
        "int_uniform": st.lists(st.integers(-10, 100), min_size=2, max_size=2), "choice": st.lists(ends, max_size=4),
        "grid": st.lists(ends, max_size=4),
    },
)  # fmt: skip


@given(space=st.dictionaries(st.sampled_from(numbers(Job)), spaces, min_size=1, max_size=3), algorithm=st.data())
def test_a_job_with_any_space_loads_or_lists_its_problems(space: dict[str, object], algorithm: st.DataObject):
    section = {"space": space, "algorithm": algorithm.draw(st.sampled_from(["optuna", "random", "grid"]))}
    try:
        job = Job.from_values({**VALUES, "search": section}, ".")
    except InvalidJob as error:
        keys = {problem.key.split(".")[1] for problem in error.problems}
    else:
        keys = {"space"}
        assert Job.from_values(job.dump(), ".").dump() == job.dump()
    assert keys == {"space"}

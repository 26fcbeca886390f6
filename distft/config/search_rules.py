"""What has to agree in the ``search`` section: with itself, and with the job that its trials are made of."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, combinations_with_replacement, product
from typing import TYPE_CHECKING, get_args

from pydantic import ValidationError

from distft.config import keys
from distft.config.addresses import scheme
from distft.config.document import Document
from distft.config.explain import explain
from distft.config.problems import Finding, choices, dotted
from distft.config.rules import TASK_METRICS, rules
from distft.config.search import RANGES, SearchSection, Space, own_value, trial_values
from distft.config.unbuilt import unbuilt
from distft.config.values import Metric

if TYPE_CHECKING:
    from distft.config.job import Job

MEASURED = {
    "language_modeling": {"loss": "min", "perplexity": "min"},
    "classification": {"loss": "min", "accuracy": "max"},
    "generation": {"loss": "min", "perplexity": "min"},
}
"""What validations in training measure for a task, and whether less or more of it is better."""

SAME_FOR_ALL = {
    "seed": "it decides which rows are validation and test, and trials are compared on the same ones",
    "data.splits": "trials are compared on the same rows",
    "data.limit": "trials are compared on the same rows",
    "evaluate": "what is scored is the same for all trials",
    "cluster.workers": "search.workers_per_trial says how many workers each trial has",
}
"""Keys, with all below them, that cannot differ between trials, and why."""

IN_MID_RUN = ("train.learning_rate", "train.weight_decay", "train.max_grad_norm")
"""Keys that population based training can change while a trial runs."""


def search_rules(job: Job) -> Iterator[Finding]:
    """Everything in a job's search that does not agree; nothing where it has none."""
    if (search := job.search) is None:
        return
    in_space = [*_space(job, search)]
    yield from in_space or _corners(job, search)
    yield from _objective(job, search)
    yield from _population(job, search) if search.scheduler.kind == "pbt" else ()
    yield from _promote(search)


def _space(job: Job, search: SearchSection) -> Iterator[Finding]:
    """What is wrong with each key of the space by itself, or with the space as a whole."""
    found = False
    for key, space in search.space.items():
        first = next(chain(_key(job, key, search), _shape(key, space, search.algorithm)), None)
        for finding in _values(job, key, space) if first is None else [first]:
            found = True
            yield finding
    if not found and all(space.listed and len(space.listed) == 1 for space in search.space.values()):
        fix = "give a key a range, or more than one value"
        yield Finding(("search", "space"), "holds one setting alone: there is nothing to search", fix)


def _key(job: Job, key: str, search: SearchSection) -> Iterator[Finding]:
    """Whether trials can differ in a key."""
    path, known = ("search", "space", key), keys.numbers(type(job))
    shared = [name for name in SAME_FOR_ALL if key == name or key.startswith(f"{name}.")]
    others = {"train.epochs": "train.steps", "train.steps": "train.epochs"}
    *parents, _ = key.split(".")
    if key not in known:
        same = [name for name in known if name.rpartition(".")[2] == key] or [keys.ELSEWHERE.get(key, "")]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) if same == [""] else same
        fix = f"did you mean {near[0]}?" if near else "any number in the job file, such as train.learning_rate"
        yield Finding(path, "is no number in the job file", fix)
    elif shared:
        yield Finding(path, f"cannot be searched: {SAME_FOR_ALL[shared[0]]}", "leave it out of the space")
    elif key == "data.max_tokens" and job.data.overlong in {"drop", "truncate"}:
        message = f"cannot be searched: trials would {job.data.overlong} other parts of the rows they are compared on"
        yield Finding(path, message, "leave it out of the space, or choose overlong: split", ("data.overlong",))
    elif key in others and own_value(job, key) is None:
        fix = f"search {others[key]}, or give the job {key} in its place"
        yield Finding(path, f"the job's length is given as {others[key]}", fix, ("train.epochs", "train.steps"))
    elif parents and own_value(job, ".".join(parents)) is None:
        parent = ".".join(parents)
        yield Finding(path, f"the job has no {parent}", f"give it {parent}, or leave this out", (parent,))
    elif inner := [other for other in search.space if other.startswith(f"{key}.")]:
        yield Finding(path, f"{inner[0]} is another way to give it", "keep one of the two")


def _shape(key: str, space: Space, algorithm: str) -> Iterator[Finding]:
    """Whether one key's space has one meaning, is not empty, and is one that the algorithm can draw from."""
    path, kinds = ("search", "space", key), space.kinds
    if len(kinds) != 1:
        message = "needs exactly one of log_uniform, uniform, int_uniform, choice and grid"
        yield Finding(path, message, f"it has {choices(kinds or ['none'])}")
        return
    (kind,) = kinds
    given = getattr(space, kind)
    if kind in RANGES and (given[0] >= given[1] or (kind == "log_uniform" and given[0] <= 0)):
        least = "0 < low < high" if kind == "log_uniform" else "low < high"
        yield Finding((*path, kind), f"[{given[0]:g}, {given[1]:g}] is no range", f"it needs {least}")
    elif kind in RANGES and algorithm == "grid":
        fix = "list them: {grid: [...]}, or use another algorithm"
        yield Finding(path, "a grid cannot try every number between two", fix, ("search.algorithm",))
    elif kind == "grid" and algorithm != "grid":
        message = f"grid says that every value is tried, which {algorithm} does not do"
        yield Finding((*path, kind), message, "use choice, or algorithm: grid", ("search.algorithm",))
    elif kind not in RANGES and (twice := [value for value, times in Counter(given).items() if times > 1]):
        yield Finding((*path, kind), f"{twice[0]:g} is listed {given.count(twice[0])} times", "keep one")


def _values(job: Job, key: str, space: Space) -> Iterator[Finding]:
    """Whether the key can have the values, each by itself."""
    (kind,) = space.kinds
    info = keys.fields(type(job))[key]
    if kind in {"log_uniform", "uniform"} and float not in keys.leaves(info.annotation):
        path = ("search", "space", key, kind)
        yield Finding(path, f"draws fractions, and {key} is a whole number", "use int_uniform or choice")
        return
    for index, value in enumerate(getattr(space, kind)):
        values = trial_values(job, {key: value})
        try:
            type(job).model_validate(values)
        except ValidationError as error:
            found = explain(error, type(job), Document("job", values))[0]
            yield Finding(("search", "space", key, kind, index), found.message, found.fix)


def _corners(job: Job, search: SearchSection) -> Iterator[Finding]:
    """Whether keys can have their values together: each two at their ends, the others at their least.

    Rules compare two numbers at most, and what they refuse goes on to an end of the range.
    """
    known = {finding.path for finding in (*unbuilt(job), *rules(job))}
    least = {key: space.ends[0] for key, space in search.space.items()}
    for first, second in combinations_with_replacement(search.space, 2):
        for one, other in product(search.space[first].ends, search.space[second].ends):
            trial = type(job).model_validate(trial_values(job, {**least, first: one, second: other}))
            for found in (*unbuilt(trial), *rules(trial)):
                if found.path in known:
                    continue
                known.add(found.path)
                key = dotted(found.path)
                place = next((name for name in (key, first, second) if name in search.space), first)
                message = found.message if place == key else f"with {first} {one:g}, {key}: {found.message}"
                yield Finding(("search", "space", place), message, found.fix, (key, *found.reads))


def _objective(job: Job, search: SearchSection) -> Iterator[Finding]:
    """Whether what is compared is measured in training, and which way is better."""
    kind, metric, mode = job.task.kind, search.objective.metric, search.objective.mode
    measured, path, reads = MEASURED[kind], ("search", "objective", "metric"), ("task.kind",)
    split, _, name = metric.partition(".")
    fix = f"choose {choices([f'validation.{name}' for name in measured])}"
    if split == "test":
        yield Finding(path, "the test split stays sealed", fix, reads)
    elif split != "validation" or name not in get_args(Metric):
        yield Finding(path, f"{metric!r} is no metric of the validation split", fix, reads)
    elif name not in TASK_METRICS[kind]:
        yield Finding(path, f"{name} means nothing for {kind}", fix, reads)
    elif name not in measured:
        yield Finding(path, f"{name} is measured on the finished model, not in training", fix, reads)
    elif mode != measured[name]:
        better = {"min": "smaller", "max": "larger"}[measured[name]]
        path = ("search", "objective", "mode")
        yield Finding(path, f"{mode} looks for the worst {name}", f"{better} is better: write {measured[name]}", reads)
    if job.data.splits.validation == 0:
        fix = "give data.splits.validation a fraction"
        yield Finding(("search", "objective"), "there is no validation split to compare on", fix, ("data.splits",))


def _population(job: Job, search: SearchSection) -> Iterator[Finding]:
    """Whether trials can go on from one another's checkpoints with other settings."""
    reads = ("search.scheduler",)
    for key in search.space:
        if key not in IN_MID_RUN:
            fix = f"search {choices(IN_MID_RUN)}, or use asha"
            yield Finding(("search", "space", key), "cannot change in mid-run, as pbt would have it", fix, reads)
    if search.trials < 2:
        yield Finding(("search", "trials"), "one trial is no population, as pbt needs", "make it larger", reads)
    if scheme(job.checkpoint.storage or ""):
        message, fix = "pbt's trials link one another's checkpoints, which a bucket has no way to", "name a folder"
        yield Finding(("checkpoint", "storage"), message, fix, reads)


def _promote(search: SearchSection) -> Iterator[Finding]:
    """Whether there is something to promote, and to where."""
    promote, path = search.promote, ("search", "promote")
    if promote is None:
        return
    if promote.top > search.trials:
        message = f"{promote.top} are more than the {search.trials} trials there are"
        yield Finding((*path, "top"), message, "make it smaller", ("search.trials",))
    if promote.workers <= search.workers_per_trial:
        message = f"{promote.workers} are no more than the workers that trials have, {search.workers_per_trial}"
        yield Finding(
            (*path, "workers"), message, "make it larger, or leave promote out", ("search.workers_per_trial",)
        )

"""The trials of a search, as ``trials.jsonl`` keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distft.runs import read_lines

Status = Literal["running", "finished", "stopped", "failed"]

#: What a search varies: the job file's dotted names, each with its value.
Params = dict[str, int | float]


@dataclass(frozen=True)
class Exploit:
    """A trial of population based training went on from another one's weights.

    Attributes:
        trial: Whose.
        step: After which step.
        tokens: Training tokens until then, of either.
        params: Its own settings until then.
        value: Its own objective then, which it gave up; None where it had none.
    """

    trial: str
    step: int
    tokens: int
    params: Params
    value: float | None


@dataclass(frozen=True)
class Trial:
    """One trial: a complete training run with settings of its own.

    Attributes:
        id: Three digits or more, from 000; also the name of its run's folder.
        params: Its settings by dotted name; those of now, where they change.
        status: ``running``; ``finished``: it came to the end of its own schedule; ``stopped`` early by the scheduler;
            ``failed``.
        steps: Optimizer steps made.
        tokens: Training tokens used (padding left out), which is what trials are compared at.
        objective: The best of ``values``, or None where there is none.
        seconds: Wall time, from its first worker's start; of all its parts, where it was interrupted.
        checkpoint: The folder of its newest complete checkpoint, or None where it has none any more.
        values: The objective as validated: (tokens, value), in order; of the model it has now, where it exploited.
        reason: Why it failed, for people; None otherwise.
        turns: Population based training: its turns that have ended, each at a rung, with a checkpoint.
        passed: How many of these rungs it was compared at; until it is, it waits for the others.
        exploits: From which trials it went on, and when, in order.
    """

    id: str
    params: Params
    status: Status = "running"
    steps: int = 0
    tokens: int = 0
    objective: float | None = None
    seconds: float = 0.0
    checkpoint: str | None = None
    values: tuple[tuple[int, float], ...] = ()
    reason: str | None = None
    turns: int = 0
    passed: int = 0
    exploits: tuple[Exploit, ...] = ()

    @property
    def number(self) -> int:
        """Its place among the trials, from 0."""
        return int(self.id)

    def with_values(self, values: Sequence[tuple[int, float]], mode: Literal["min", "max"]) -> Trial:
        """The same with what was validated so far, and the best of it as its objective."""
        best = min if mode == "min" else max
        objective = best((value for _, value in values), default=None)
        return replace(self, values=tuple(values), objective=objective)


def trial_id(number: int) -> str:
    """The id of trial ``number``, counted from 0."""
    return f"{number:03d}"


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Writes one line a trial, the whole file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    lines = (json.dumps(asdict(trial), ensure_ascii=False, allow_nan=False) + "\n" for trial in trials)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def read_trials(path: Path) -> list[Trial]:
    """The trials of a search, in their order; none where nothing was written yet."""
    return [_trial(line) for line in read_lines(path)]


def _trial(line: dict[str, Any]) -> Trial:
    values = tuple((tokens, value) for tokens, value in line["values"])
    exploits = tuple(Exploit(**one) for one in line.get("exploits", ()))
    return Trial(**{**line, "values": values, "exploits": exploits})


def ranked(trials: Sequence[Trial], mode: Literal["min", "max"]) -> list[Trial]:
    """Those that have an objective and did not fail, the best first; of equal ones the earlier first."""
    known = [trial for trial in trials if trial.objective is not None and trial.status != "failed"]
    sign = 1.0 if mode == "min" else -1.0
    return sorted(known, key=lambda trial: (sign * (trial.objective or 0.0), trial.number))


def best_trial(trials: Sequence[Trial], mode: Literal["min", "max"]) -> Trial | None:
    """The first of :func:`ranked`; None where no trial has an objective."""
    return next(iter(ranked(trials, mode)), None)

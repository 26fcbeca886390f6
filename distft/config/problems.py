"""What is wrong with a job: one :class:`Problem` a line, and the two errors that carry a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distft.errors import DataError, JobError

Path = tuple[str | int, ...]
"""The way to a value from the top of the job file: ``("train", "schedule", "warmup")``."""


@dataclass(frozen=True)
class Finding:
    """Something wrong, before anybody has looked up where it was written.

    Attributes:
        path: The key that is wrong.
        message: What is wrong with it, in plain words.
        fix: What to do about it.
        reads: Other keys, dotted, that the judgement rests on; it is void where one of them is wrong itself.
    """

    path: Path
    message: str
    fix: str | None = None
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One mistake in a job.

    Attributes:
        where: ``job.yaml:12``, or ``--set train.steps=0``, or the job file's name where no line holds the mistake.
        line: Line in the job file, from 1; None where there is none.
        key: Dotted key, ``train.learning_rate``; empty where the file as a whole is meant.
        value: The value that is wrong, None where it is absent.
        message: What is wrong, in plain words.
        fix: What to do about it.
    """

    where: str
    line: int | None
    key: str
    value: Any
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        subject = f"{self.key}: " if self.key else ""
        advice = f"; {self.fix}" if self.fix else ""
        return f"{self.where}  {subject}{self.message}{advice}"


class InvalidJob(JobError):
    """The job file, or what ``--set`` made of it, has mistakes; ``problems`` holds every one of them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_listing(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class UnusableFiles(DataError):
    """The job is well-formed, but files that it names are not there; ``problems`` holds every one of them."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_listing(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def dotted(path: Path) -> str:
    """``train.schedule.warmup``; entries of a list by their position from 0: ``data.source.1``."""
    return ".".join(str(part) for part in path)


def choices(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _listing(problems: Sequence[Problem]) -> str:
    """One problem a line, below a line that counts them where there are several."""
    lines = [str(problem) for problem in problems]
    return lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems", *lines])

"""A run in one line, for lists: cheap to read, also where there are many runs and long ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.report.facts import read
from distft.report.verdict import gained, judge
from distft.runs import Run


@dataclass(frozen=True)
class Brief:
    """A run in short.

    Attributes:
        name: Its name.
        folder: Where it lies.
        task: The task's kind.
        model: The base model's address.
        status: begun, running, finished, trained, searched, interrupted, failed; or ``silent``: it says that it runs,
            and nothing was heard of it for long.
        reason: Why it ended so, or None.
        step: Steps made.
        steps: Steps planned, where that is known.
        began: When, in seconds since the epoch.
        bytes: Its size on disk, of what lies in the folder.
        metric: The first metric of its task, where it was scored.
        score: The tuned model's on the test split: value, low, high, n.
        difference: From the base model's, paired.
        better: Whether that is a gain for sure; None where its interval includes zero or nothing was compared.
        verdict: What its report begins with.
        problems: What cannot be read of it.
    """

    name: str
    folder: str
    task: str
    model: str
    status: str
    reason: str | None
    step: int
    steps: int | None
    began: float
    bytes: int
    metric: str | None
    score: dict[str, float] | None
    difference: dict[str, float] | None
    better: bool | None
    verdict: str
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def runs_in(folder: Path) -> list[Brief]:
    """All runs of a folder, the newest first; none where there is no such folder."""
    found = [brief(Run(path.parent)) for path in folder.glob("*/job.yaml")] if folder.is_dir() else []
    return sorted(found, key=lambda one: (-one.began, one.name))


def brief(run: Run) -> Brief:
    """A run in short, whatever state it is in."""
    facts = read(run, whole=False)
    metric = facts.headline
    score, change = (facts.scores.get(kind, {}).get("test", {}).get(metric) for kind in ("best", "difference"))
    return Brief(
        name=run.name,
        folder=str(run.folder),
        task=facts.kind,
        model=facts.model,
        status=facts.status if facts.silent_seconds is None else "silent",
        reason=facts.result.get("reason"),
        step=facts.step,
        steps=facts.planned,
        began=facts.when,
        bytes=sum(sizes(run.folder)),
        metric=metric,
        score=score,
        difference=change,
        better=gained(metric, change) if metric and change else None,
        verdict=judge(facts).title,
        problems=facts.problems,
    )


def sizes(folder: Path) -> Iterator[int]:
    """The bytes of every file below a folder; a file that goes while it is looked at counts nothing."""
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield Path(path, name).lstat().st_size

"""Reads a run's folder, whatever state it is in; what cannot be read is told, and is no error."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import DistftError
from distft.ledger.goodput import Goodput, goodput
from distft.runs import Run
from distft.task.metrics import METRICS, headline
from distft.tuning.trials import Trial, read_trials

Record = dict[str, Any]

#: A run that says it goes on is taken for dead after so many of its steps without a line, and never before so long.
SILENT_STEPS, SILENT_SECONDS = 20.0, 600.0
#: What each score has.
ESTIMATE = ("value", "low", "high", "n")
#: What is read of the end of a long file, where that is enough.
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Facts:
    """What a run's folder holds; empty where a file is not there.

    Attributes:
        run: The run.
        problems: What is damaged or from another version, a line each, for people.
        result: ``result.json``.
        resolved: ``resolved.json``.
        environment: ``environment.json``.
        card: The data card.
        scores: ``evaluation.json``.
        job: The job as run; None where this version cannot read it.
        job_text: The job file, word for word.
        steps: ``train`` lines by step; of a step done again the later one.
        validations: Likewise ``validation`` lines.
        events: ``event`` lines, in order.
        lines: All lines of ``metrics.jsonl``, in order.
        spent: Where the time went; None where that cannot be told.
        plan: ``plan.json``: what was predicted of the run, and what was measured; of runs that were planned.
        answers: ``answers.jsonl``.
        examples: ``examples.json``: documents that were scored, from the worst to the best.
        trials: The trials of its search.
        search: The search's ``summary.json``.
    """

    run: Run
    problems: tuple[str, ...]
    result: Record
    resolved: Record
    environment: Record
    card: Record
    scores: Record
    job: Job | None
    job_text: str
    steps: list[Record]
    validations: list[Record]
    events: list[Record]
    lines: list[Record]
    spent: Goodput | None
    plan: Record
    answers: list[Record]
    examples: Record
    trials: list[Trial]
    search: Record

    @property
    def status(self) -> str:
        """How the run is: as ``result.json`` says, or ``begun`` where there is none yet."""
        return str(self.result.get("status", "begun"))

    @property
    def silent_seconds(self) -> float | None:
        """For how long a run that says it goes on has said nothing; None where that is no longer than usual."""
        if self.status not in ("running", "begun"):
            return None
        usual = float(self.steps[-1].get("step_seconds", 0.0)) if self.steps else 0.0
        silent = time.time() - (self.lines[-1].get("time", 0.0) if self.lines else _changed(self.run.job))
        return silent if silent > max(SILENT_SECONDS, SILENT_STEPS * usual) else None

    @property
    def kind(self) -> str:
        """The task's kind, or ``unknown``."""
        return str(self._setting("task", "kind") or "unknown")

    @property
    def model(self) -> str:
        """The base model's address."""
        return str(self._setting("model", "source") or "unknown")

    @property
    def step(self) -> int:
        """Steps made."""
        return int(self.steps[-1]["step"]) if self.steps else _whole(self.result.get("step")) or 0

    @property
    def planned(self) -> int | None:
        """Steps that it was to make, where that is known."""
        return _whole(self.steps[-1].get("steps")) if self.steps else None

    @property
    def headline(self) -> str | None:
        """The metric that tells whether the model is better, among those that were scored."""
        best = next((model for model in ("best", "last", "base") if model in self.scores), None)
        scored: Record = next(iter(self.scores[best].values()), {}) if best else {}
        wanted = headline(self.job) if self.job else None
        return wanted if wanted in scored else next((name for name in scored if name in METRICS), None)

    @property
    def wall_seconds(self) -> float | None:
        """How long it took, where that is known."""
        told = self.result.get("wall_seconds")
        return float(told) if isinstance(told, int | float) else self.spent.wall if self.spent else None

    @property
    def when(self) -> float:
        """When it began, in seconds since the epoch."""
        return float(self.lines[0]["time"]) if self.lines and "time" in self.lines[0] else _changed(self.run.job)

    def _setting(self, section: str, key: str) -> Any:
        found = self.resolved.get("job")
        for name in (section, key):
            found = found.get(name) if isinstance(found, dict) else None
        return found


def read(run: Run, *, whole: bool = True) -> Facts:
    """Reads a run's folder.

    Args:
        run: The run.
        whole: Whether to read all of ``metrics.jsonl`` and what else is long; a list of runs can do with its ends.
    """
    problems: list[str] = []

    def document(path: Path) -> Record:
        found = _try(lambda: json.loads(path.read_text(encoding="utf-8")), path, problems)
        if found is not None and not isinstance(found, dict):
            problems.append(f"{path.name} holds something else than it should")
        return found if isinstance(found, dict) else {}

    result, resolved = document(run.result), document(run.resolved)
    lines = _lines(run.metrics, problems, get=Path.read_bytes if whole else _ends)
    text = _try(lambda: run.job.read_text(encoding="utf-8", errors="replace"), run.job, problems) or ""
    return Facts(
        run=run,
        result=result,
        resolved=resolved,
        environment=document(run.environment),
        card=document(run.card),
        scores=_scores(document(run.evaluation), problems),
        job=_job(run, resolved, text, problems),
        job_text=text,
        steps=_standing(lines, "train"),
        validations=_standing(lines, "validation"),
        events=[line for line in lines if line["kind"] == "event"],
        lines=lines,
        spent=_spent(lines, problems) if lines and whole else None,
        plan=document(run.folder / "plan.json"),
        answers=_lines(run.answers, problems, kinds=False) if whole else [],
        examples=document(run.examples) if whole else {},
        trials=(_try(lambda: read_trials(run.trials), run.trials, problems) or []) if whole else [],
        search=document(run.search_summary),
        problems=tuple(problems),
    )


def _try(read_it: Callable[[], Any], path: Path, problems: list[str]) -> Any:
    """What reading gives; None, and a problem, where it does not; None alone where there is no such file."""
    try:
        return read_it()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        problems.append(f"{path.name} is damaged: it is no text")
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{path.name} is damaged or of another version: {error}")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    return None


def _ends(path: Path) -> bytes:
    """The first line of a file, and the whole lines at its end."""
    with path.open("rb") as file:
        first = file.readline()
        length = file.seek(0, os.SEEK_END)
        begin = max(len(first), length - TAIL_BYTES)
        file.seek(begin)
        rest = file.read()
    return first + (rest if begin == len(first) else rest.partition(b"\n")[2])


def _lines(
    path: Path, problems: list[str], *, kinds: bool = True, get: Callable[[Path], bytes] = Path.read_bytes
) -> list[Record]:
    """The whole lines of a file; says how many are not.

    Args:
        path: The file.
        problems: Where problems are told.
        kinds: Whether each line needs a kind, a time and a step.
        get: What is read of it.
    """
    content = _try(lambda: get(path), path, problems)
    if content is None:
        return []
    found: list[Record] = []
    broken = 0
    for line in content.splitlines():
        record = None
        with contextlib.suppress(ValueError):
            record = json.loads(line)
        if isinstance(record, dict) and (not kinds or _is_line(record)):
            found.append(record)
        else:
            broken += 1
    if broken:
        problems.append(f"{broken:,} of {broken + len(found):,} lines of {path.name} cannot be read, and are left out")
    return found


def _is_line(record: Record) -> bool:
    return (
        record.get("kind") in ("train", "validation", "event")
        and isinstance(record.get("time"), int | float)
        and isinstance(record.get("step"), int)
    )


def _standing(lines: list[Record], kind: str) -> list[Record]:
    by_step = {line["step"]: line for line in lines if line["kind"] == kind}
    return [by_step[step] for step in sorted(by_step)]


def _spent(lines: list[Record], problems: list[str]) -> Goodput | None:
    try:
        return goodput([line for line in lines if line.get("event") != "export"])  # which is after training
    except (KeyError, TypeError, ValueError):
        problems.append("where the time went cannot be told: metrics.jsonl lacks times that this version reads")
        return None


def _job(run: Run, resolved: Record, text: str, problems: list[str]) -> Job | None:
    values = resolved.get("job")
    if values is None:
        if text:
            problems.append(f"{run.resolved.name} is not there: settings are not known")
        return None
    try:
        return Job.from_values(values, resolved.get("folder", run.folder))
    except (DistftError, AttributeError, LookupError, TypeError, ValueError):
        problems.append("the job's settings are of another version of distft than this one, which reads them in part")
        return None


def _scores(scores: Record, problems: list[str]) -> Record:
    """``evaluation.json`` without what is no estimate."""
    sound = {}
    for model, splits in scores.items():
        try:
            if model == "classes":
                sound[model] = {
                    kind: {split: _classes(its) for split, its in of.items()} for kind, of in splits.items()
                }
                continue
            sound[model] = {
                split: {
                    name: its
                    for name, its in metrics.items()
                    if name in METRICS and all(isinstance(its.get(key), int | float) for key in ESTIMATE)
                }
                for split, metrics in splits.items()
            }
        except (AttributeError, LookupError, TypeError, ValueError):
            problems.append(f"evaluation.json is damaged or of another version: {model}")
    return {model: {split: its for split, its in splits.items() if its} for model, splits in sound.items()}


def _classes(its: Record) -> Record:
    """A per-class table with its confusion matrix, as they are where they are sound."""
    shares = ("precision", "recall", "f1", "support")
    labels = {name: {share: its["labels"][name][share] + 0 for share in shares} for name in its["labels"]}
    confusion = [[int(count) for count in row] for row in its["confusion"]]
    if {len(labels)} != {len(confusion), *map(len, confusion)}:
        raise ValueError("a confusion matrix that is not square")
    return {"labels": labels, "confusion": confusion}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

"""The job: everything that one file says, checked as a whole before anything is started."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError

from distft.config.document import Document, read
from distft.config.explain import explain
from distft.config.overrides import override
from distft.config.passwords import passwords
from distft.config.problems import Finding, InvalidJob, Path, Problem, dotted
from distft.config.rules import rules
from distft.config.search import SearchSection
from distft.config.search_rules import search_rules
from distft.config.sections import (
    CheckpointSection,
    ClusterSection,
    DataSection,
    EvaluateSection,
    ModelSection,
    ServeSection,
    TaskSection,
    TrackSection,
    TrainSection,
    ZeroSection,
)
from distft.config.unbuilt import unbuilt
from distft.config.values import RunName, Section

STAND_INS: dict[str, dict[str, Any]] = {
    "model": {"source": "model"},
    "task": {"kind": "language_modeling"},
    "data": {"source": "data"},
    "search": {"space": {"train.learning_rate": {"choice": [1.0e-5]}}},
}
"""Values for required keys that are wrong or missing, so that the rest of the job can be judged all the same."""


class Job(Section):
    """A fine-tuning job. Frozen; ``auto`` values stay ``auto``: what is decided later is not written back."""

    name: RunName = "job"
    """Name of the run; default: that of the job file."""
    seed: int = Field(default=17, ge=0, lt=2**32)
    """Fixes splits, order, dropout and everything else that is drawn."""
    model: ModelSection
    """The pretrained model to begin from."""
    task: TaskSection
    """What the model learns to do."""
    data: DataSection
    """The rows to learn from."""
    train: TrainSection = TrainSection()
    """Training."""
    zero: ZeroSection = ZeroSection()
    """What ZeRO shards over the workers, and where it keeps it."""
    cluster: ClusterSection = Field(default_factory=lambda: ClusterSection.model_validate({}))
    """Where and on how many workers the job runs."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving the state of training."""
    search: SearchSection | None = None
    """Hyperparameter search before training; null: none."""
    evaluate: EvaluateSection = EvaluateSection()
    """Scores of the finished model."""
    serve: ServeSection = ServeSection()
    """The finished model behind an API."""
    track: TrackSection = TrackSection()
    """Experiment trackers that are told each step."""

    _folder: File = PrivateAttr(default_factory=File.cwd)
    _document: Document = PrivateAttr(default_factory=lambda: Document("job", {}))

    @classmethod
    def load(cls, path: File | str, overrides: Sequence[str] = ()) -> Self:
        """Reads and checks a job file.

        Args:
            path: The file.
            overrides: Settings ``dotted.key=value`` that take the place of what the file says.

        Raises:
            InvalidJob: A JobError that lists every mistake with its line, its key, its value and the fix.
        """
        file = File(path).expanduser()
        written = read(file)
        if hidden := list(passwords(written, overrides)):
            raise InvalidJob(hidden)  # alone: what else is wrong might repeat them
        document = override(written, overrides)
        stem = re.sub(r"[^\w.-]+", "-", file.stem).lstrip(".-")[:100] or "job"
        return cls._checked(document, file.resolve().parent, name=stem)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], folder: File | str, overrides: Sequence[str] = ()) -> Self:
        """A job from plain values, such as those of :meth:`dump`; checked like a file.

        Args:
            values: What the job file would hold.
            folder: Where relative paths begin.
            overrides: Settings ``dotted.key=value`` that take the place of what the values say.

        Raises:
            InvalidJob: A JobError that lists every mistake.
        """
        return cls._checked(override(Document("job", values), overrides), File(folder).resolve(), name="job")

    @property
    def folder(self) -> File:
        """The job file's folder, where relative paths in the job begin."""
        return self._folder

    @property
    def text(self) -> str:
        """The job file, word for word; for a job that came from no file, its settings as YAML (JSON is YAML)."""
        return self._document.text or json.dumps(self.dump(), indent=2, ensure_ascii=False) + "\n"

    def dump(self) -> dict[str, Any]:
        """Every setting with its default, as plain values; :meth:`from_values` takes them back."""
        return self.model_dump(mode="json")

    def where(self, key: str) -> str:
        """Where a dotted key was written: ``job.yaml:12``, ``--set ...``, or the file where it was not."""
        return self._document.mark(tuple(key.split("."))).where

    def place(self, finding: Finding) -> Problem:
        """A finding about this job, with the line that it concerns."""
        return self._document.place(finding)

    @classmethod
    def _checked(cls, document: Document, folder: File, name: str) -> Self:
        """The job of a document; InvalidJob with everything that is wrong in it."""
        values = {"model": {}, "task": {}, "data": {}, **document.values}
        if values.get("name") is None:
            values["name"] = name
        document = replace(document, values=values)
        broken: set[Path] = set()
        findings: list[Finding] = []
        try:
            job = cls.model_validate(values)
        except ValidationError as error:
            unread = {problem.key for problem in document.problems if problem.value is None}
            findings = [found for found in explain(error, cls, document) if dotted(found.path) not in unread]
            broken = {details["loc"][:2] for details in error.errors(include_url=False)}
            job = cls.model_validate(_repaired(values, broken))
        findings += _clashes(job, broken)
        problems = [*document.problems, *(document.place(finding) for finding in findings)]
        if problems:
            raise InvalidJob(sorted(problems, key=lambda problem: problem.line or 1 << 30))
        job._folder, job._document = folder, document
        return job


def _repaired(values: Mapping[str, Any], broken: set[Path]) -> dict[str, Any]:
    """The values without the broken ones, for which defaults or stand-ins take their place."""
    whole = {
        name: {key: value for key, value in section.items() if (name, key) not in broken}
        if isinstance(section, Mapping)
        else section
        for name, section in values.items()
        if (name,) not in broken
    }
    stand_ins = {name: keys for name, keys in STAND_INS.items() if name != "search" or whole.get("search") is not None}
    return whole | {name: {**keys, **whole.get(name, {})} for name, keys in stand_ins.items()}


def _clashes(job: Job, broken: set[Path]) -> list[Finding]:
    """What is not built, and what does not agree, as far as it rests on values that are not broken themselves."""

    def sound(path: Path) -> bool:
        return not any(path[:length] in broken for length in range(1, len(path) + 1))

    missing = [finding for finding in unbuilt(job) if sound(finding.path)]
    refused = {finding.path for finding in missing}
    return missing + [
        finding
        for finding in (*rules(job), *search_rules(job))
        if finding.path not in refused
        and sound(finding.path)
        and all(sound(tuple(key.split("."))) for key in finding.reads)
    ]

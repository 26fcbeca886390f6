"""What all trials of a search have in common, and what each of them leaves to be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distft.config import Job
from distft.data.store import Prepared
from distft.orchestrate.data import Data
from distft.runs import Run, read_lines, training_curve, write_json
from distft.task.prepare import prepare
from distft.train.folder import begin
from distft.tuning.space import changes_data, section, trial_job
from distft.tuning.trials import Params


@dataclass(frozen=True)
class SearchSetup:
    """What all trials of a search have in common; it crosses the cluster by pickling.

    Attributes:
        job: The job of the search.
        run: The run that the search belongs to.
        data: What the job works on.
        need: What a worker needs.
        rungs: Training tokens at which trials are compared.
        budget_bytes: What one trial's checkpoints may take.
        cache: The cache folder.
    """

    job: Job
    run: Run
    data: Data
    need: dict[str, float]
    rungs: tuple[int, ...]
    budget_bytes: int
    cache: Path

    @property
    def metric(self) -> str:
        """The objective's name in a validation's record."""
        return section(self.job).objective.metric.removeprefix("validation.")

    def trial_run(self, trial: str) -> Run:
        """The run of a trial: a folder like any other's."""
        return Run(self.run.search / "trials" / trial)

    def trial_job(self, params: Params, workers: int | None = None) -> Job:
        """The job of a trial, with its share of the room for checkpoints; on ``workers_per_trial`` workers."""
        values = trial_job(self.job, params, workers or section(self.job).workers_per_trial).dump()
        place = self.job.checkpoint.storage
        values["checkpoint"] |= {
            "budget": f"{self.budget_bytes}B",
            "storage": None if place is None else f"{place.rstrip('/')}/{self.run.name}-search",
        }
        return Job.from_values(values, self.job.folder)

    def begun(self, trial: str, params: Params, job: Job) -> Data:
        """What a trial works on; its run's folder is there from now on.

        Data of its own are prepared in this process: tasks would wait for the cores that the trial holds.
        """
        data, run = self.data, self.trial_run(trial)
        if changes_data(params):
            data = Data(data.model, prepare(job, data.model))
        if not run.job.exists():
            begin(job, run)
            write_json(run.card, Prepared.open(data.prepared).card)
        return data

    def validations(self, trial: str) -> list[Validation]:
        """What a trial has told so far, in the order of steps; a step done again tells nothing new."""
        run = self.trial_run(trial)
        tokens, total = {}, 0
        for line in training_curve(run.metrics):
            total += line["tokens"]
            tokens[line["step"]] = total, line["step"] == line["steps"]
        found = {line["step"]: line[self.metric] for line in read_lines(run.metrics) if line["kind"] == "validation"}
        return [Validation(step, *tokens[step], value) for step, value in sorted(found.items()) if step in tokens]


@dataclass(frozen=True)
class Validation:
    """The objective of a trial at a step.

    Attributes:
        step: After which.
        tokens: Training tokens until then.
        last: Whether it is the trial's last step.
        value: The objective.
    """

    step: int
    tokens: int
    last: bool
    value: float

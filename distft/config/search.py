"""The ``search`` section: hyperparameter search over numbers of the job file (contract, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from distft.config.document import Document
from distft.config.overrides import put
from distft.config.values import Count, Section

if TYPE_CHECKING:
    from distft.config.job import Job

Range = Annotated[list[float], Field(min_length=2, max_length=2)]
IntRange = Annotated[list[int], Field(min_length=2, max_length=2)]
Numbers = Annotated[list[int | float], Field(min_length=1)]


RANGES = ("log_uniform", "uniform", "int_uniform")
LISTS = ("choice", "grid")
"""The kinds of space: a range [low, high], or values listed one by one."""


class Space(Section):
    """Where one number of the job file is looked for; exactly one of the keys is given."""

    log_uniform: Range | None = None
    """[low, high]: any number between, each order of magnitude as likely as the next."""
    uniform: Range | None = None
    """[low, high]: any number between."""
    int_uniform: IntRange | None = None
    """[low, high]: any whole number between, both included."""
    choice: Numbers | None = None
    """A list of numbers: one of them."""
    grid: Numbers | None = None
    """A list of numbers: every one of them, which takes algorithm: grid."""

    @property
    def kinds(self) -> list[str]:
        """The keys that are given: one, in a space that is in order."""
        return [kind for kind in (*RANGES, *LISTS) if getattr(self, kind) is not None]

    @property
    def listed(self) -> list[int | float] | None:
        """The values, where they are listed one by one; None for a range."""
        return self.choice if self.choice is not None else self.grid

    @property
    def ends(self) -> tuple[int | float, int | float]:
        """The least and the most, of a range or of a list."""
        values = getattr(self, self.kinds[0])
        return min(values), max(values)


class Objective(Section):
    """What the search makes as small, or as large, as it can."""

    metric: str = "validation.loss"
    """`validation.` and a metric measured in training: loss, perplexity or (classification) accuracy."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better: min or max."""


class Scheduler(Section):
    """What trials are compared for."""

    kind: Literal["asha", "median", "pbt", "none"] = "asha"
    """asha, median: poor trials are stopped before their end; pbt (population based training): poor ones go on from the
    good ones' weights, with other settings; or none."""
    grace: Annotated[float, Field(gt=0, le=1)] = 0.1
    """How far every trial may go before it can be stopped: a fraction of the most tokens a trial can train on;
    pbt: from one comparison to the next."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """Trials are compared at grace, and then at so many times the tokens of the time before; asha: one trial in so many
    goes on."""


class Promote(Section):
    """Which trials go on from where they ended, on more workers."""

    top: Count = 1
    """How many: the best ones."""
    workers: Count
    """Workers of each from then on; its state is sharded anew for them."""


class SearchSection(Section):
    """Hyperparameter search; the winner's settings become the training run."""

    space: Annotated[dict[str, Space], Field(min_length=1)]
    """Numbers of the job file by their dotted names, each with where to look."""
    objective: Objective = Objective()
    """What is compared."""
    trials: Count = 16
    """How many settings are tried at most."""
    algorithm: Literal["optuna", "random", "grid"] = "optuna"
    """How the next setting is found: optuna, random or grid (every combination of the listed values, in order)."""
    scheduler: Scheduler = Scheduler()
    """Which trials are stopped before their end."""
    workers_per_trial: Count = 1
    """Workers of each trial, which is a sharded run of its own."""
    concurrent: Count | Literal["auto"] = "auto"
    """Trials at the same time; auto: what the cluster holds."""
    promote: Promote | None = None
    """{top: 2, workers: 8}: the best trials go on, on more workers, by re-sharding their state; null: none does."""


def own_value(job: Job, key: str) -> Any:
    """The job's own value of a dotted key; None where it has none."""
    return Document("job", job.dump()).value(tuple(key.split(".")))


def trial_values(job: Job, params: Mapping[str, int | float]) -> dict[str, Any]:
    """The job's values with those of a trial, by dotted name, and without the search."""
    values = job.dump() | {"search": None}
    for key, value in params.items():
        put(values, tuple(key.split(".")), value)
    return values

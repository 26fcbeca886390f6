"""The ``search`` section: hyperparameter search over numbers of the job file (contract, section 5)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distft.config.values import Count, Section

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class Space(Section):
    """Where one number of the job file is looked for; exactly one of the keys is given."""

    log_uniform: Pair | None = None
    """[low, high]: any number between, each order of magnitude as likely as the next."""
    uniform: Pair | None = None
    """[low, high]: any number between."""
    choice: Annotated[list[int | float], Field(min_length=1)] | None = None
    """A list of numbers: one of them."""


class Objective(Section):
    """What the search makes as small, or as large, as it can."""

    metric: str = "validation.loss"
    """`validation.` and the name of a metric; the test split stays sealed."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better: min or max."""


class Scheduler(Section):
    """Which trials are stopped before their end."""

    kind: Literal["asha", "median", "pbt", "none"] = "asha"
    """asha, median, pbt (population based training) or none."""
    grace: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Fraction of a run that every trial may go before it can be stopped."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """asha: of so many trials one goes on at each rung."""


class SearchSection(Section):
    """Hyperparameter search; the winner's settings become the training run."""

    space: Annotated[dict[str, Space], Field(min_length=1)]
    """Numbers of the job file by their dotted names, each with where to look."""
    objective: Objective = Objective()
    """What is compared."""
    trials: Count = 16
    """How many settings are tried."""
    algorithm: Literal["optuna", "random", "grid"] = "optuna"
    """How the next setting is found: optuna, random or grid."""
    scheduler: Scheduler = Scheduler()
    """Which trials are stopped before their end."""
    workers_per_trial: Count = 1
    """Workers of each trial, which is a sharded run of its own."""
    concurrent: Count | Literal["auto"] = "auto"
    """Trials at the same time; auto: what the cluster holds."""

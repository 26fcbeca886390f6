"""Everything that distft refuses or gives up on, as one tree.

::

    DistftError                     exit status
    ├── JobError                    2    the job file or the call is wrong
    ├── DataError                   3    the data (or the model's files) is wrong
    ├── CapacityError               4    it cannot fit, or the cluster cannot hold it
    ├── RunError                    5    training, evaluation or export failed
    │   ├── NonFiniteLoss                a loss or gradient norm that is not a number
    │   ├── CheckpointError              a checkpoint that cannot be written or trusted
    │   └── ClusterLost                  a cluster whose head does not answer any more
    └── Interrupted                 130  stopped on request; --resume goes on

Each error says what is wrong, where, and what to do; each survives pickling, so that it crosses processes whole.
A person sees the message; our own bugs are ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

from typing import Any


class DistftError(Exception):
    """An error that a person can act on.

    Args:
        what: What is wrong, with the value that is wrong.
        where: The file, line, key, rank or step that it concerns.
        fix: What to do about it.
    """

    exit_status = 5

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class JobError(DistftError):
    """The job file or the call is wrong."""

    exit_status = 2


class DataError(DistftError):
    """The data, or a model's files, cannot be used as they are."""

    exit_status = 3


class CapacityError(DistftError):
    """The job does not fit this device, disk or cluster."""

    exit_status = 4


class RunError(DistftError):
    """Training, evaluation or export failed."""

    exit_status = 5


class NonFiniteLoss(RunError):
    """A loss or gradient norm is NaN or infinite; the last good checkpoint is kept."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or cannot be trusted."""


class ClusterLost(RunError):
    """The cluster's head does not answer any more.

    Ray, asked to leave such a cluster, waits for the head until it ends this process with a status of its own.
    """


class Interrupted(DistftError):
    """The run was stopped on request and can be resumed."""

    exit_status = 130

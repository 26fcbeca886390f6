"""A run takes over what another one has trained."""

from __future__ import annotations

import os
import shutil

from distft.checkpoint import Folder, complete, signing_key, storage_of
from distft.config import Job
from distft.runs import Run
from distft.train.folder import job_of


def adopt(job: Job, trial: Run, run: Run) -> bool:
    """Links a trial's checkpoints into a run in the place of its own, with what goes with them.

    Args:
        job: The run's.
        trial: Whose checkpoints.
        run: Where to.

    Returns:
        Whether the trial has any, in a folder; nothing is done where it has none.
    """
    theirs, ours = storage_of(job_of(trial), trial), storage_of(job, run)
    if (
        not isinstance(theirs, Folder)
        or not isinstance(ours, Folder)
        or not complete(theirs, signing_key(trial, theirs))
    ):
        return False
    shutil.rmtree(ours.root, ignore_errors=True)
    shutil.copytree(theirs.root, ours.root, copy_function=_link)
    for source, target in ((trial.key, run.key), (trial.metrics, run.metrics), (trial.row_losses, run.row_losses)):
        target.unlink(missing_ok=True)
        shutil.copy2(source, target)  # the trial's own stay as they are
    return True


def _link(source: str, target: str) -> None:
    """Checkpoints are never written to again, so that two folders can share them."""
    try:
        os.link(source, target)
    except OSError:  # the file system has no links, or the folders are on two
        shutil.copy2(source, target)

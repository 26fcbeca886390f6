"""A run's folder: made for a new run, found for a resumed one, and read back as a job."""

from __future__ import annotations

import tempfile
from pathlib import Path

from distft.config import Job
from distft.config.search import trial_values
from distft.errors import JobError
from distft.runs import Run, read_json, write_json
from distft.train.environment import environment


def run_folder(job: Job, runs: Path, name: str | None, resume: bool) -> Run:
    """The folder of a new run, which must not be there yet, or of a run to resume, which must.

    Raises:
        JobError: The name is taken, or there is nothing to resume, or the job has changed since, or nothing can be
            written there.
    """
    run = Run((runs / (name or job.name)).resolve())
    if run.job.exists() != resume:
        raise JobError(
            f"there is no run {run.name!r} to resume" if resume else f"the run {run.name!r} exists already",
            where=str(run.folder),
            fix="run it without --resume" if resume else "go on with it (--resume), or give this one another --name",
        )
    if resume:
        _check_unchanged(job, run)
    _check_writable(run.folder if resume else run.folder.parent)
    if resume:
        run.stop_request.unlink(missing_ok=True)
    return run


def _check_writable(folder: Path) -> None:
    """Makes sure that files can be made in a folder, before anything is computed for them; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise JobError(
            f"nothing can be written there: {error.strerror}",
            where=str(folder),
            fix="keep runs elsewhere: --runs DIR, or DISTFT_RUNS",
        ) from error


def begin(job: Job, run: Run) -> None:
    """Makes a new run's folder, with the job as read and as run."""
    run.logs.mkdir(parents=True, exist_ok=True)
    write_json(run.environment, environment())
    write_json(run.resolved, {"job": job.dump(), "folder": str(job.folder), "decisions": {}})
    run.job.write_text(job.text, encoding="utf-8")  # last: its presence makes the folder a run


#: Sections that make the loss curve. Others may change on resume: workers, ZeRO stage, checkpoints, tracking.
CURVE = ("seed", "model", "task", "data", "train")

#: What the trials of a search were chosen and compared by; there may be more of them on resume, and on more workers.
SEARCH = ("space", "objective", "algorithm", "scheduler")


def _check_unchanged(job: Job, run: Run) -> None:
    """A resumed run is the same run only while what makes its curve is the same."""
    before, now = read_json(run.resolved)["job"], job.dump()
    changed = [section for section in CURVE if before[section] != now[section]]
    if before["search"] and now["search"]:
        changed += [f"search.{part}" for part in SEARCH if before["search"][part] != now["search"][part]]
    if changed:
        raise JobError(
            f"the job has changed since this run began, in: {', '.join(changed)}",
            where=str(run.job),
            fix="resume with the job as it was (this file), or start a new run with --name",
        )


def job_of(run: Run) -> Job:
    """The job of a run, with the settings it was run with: those that its search found, where it had one."""
    resolved = read_json(run.resolved)
    job = Job.from_values(resolved["job"], resolved["folder"])
    return Job.from_values(trial_values(job, resolved["search"]), job.folder) if "search" in resolved else job

"""The job's task, and preparing its data in this process: under torchrun, in a bare process, in tests."""

from __future__ import annotations

from pathlib import Path

from distft.config import Job
from distft.data.example import Task
from distft.data.prepare import Progress, prepared_folder
from distft.errors import JobError
from distft.task.language_modeling import LanguageModeling


def task_of(job: Job, model_folder: Path) -> Task:
    """The task that the job names, with the model's tokenizer; loads transformers.

    Raises:
        JobError: The task is not built yet.
        DataError: The tokenizer has no end of text, or is not of the fast kind.
    """
    if job.task.kind != "language_modeling":
        raise JobError(f"{job.task.kind} is not built yet", where="task.kind", fix="use language_modeling")
    from distft.model import end_of_text_id, load_tokenizer  # torch takes seconds to import; a cache hit needs none

    tokenizer = load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code)
    return LanguageModeling.from_tokenizer(
        tokenizer,
        end_of_text_id(tokenizer),
        max_tokens=job.data.max_tokens,
        overlong=job.data.overlong,
        column=job.task.text,
    )


def prepare(job: Job, model_folder: Path, progress: Progress | None = None) -> Path:
    """The folder of the job's prepared data, built in this process if it is not there.

    Raises:
        DataError: The data cannot be used as it is.
        CapacityError: The disk is full.
    """
    return prepared_folder(job, model_folder, lambda: task_of(job, model_folder), progress=progress)

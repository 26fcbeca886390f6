"""The job's task, and preparing its data in this process: under torchrun, in a bare process, in tests."""

from __future__ import annotations

from pathlib import Path

from distft.config import Job
from distft.data.example import Task
from distft.data.prepare import Progress, prepared_folder
from distft.task.classification import Classification
from distft.task.generation import Generation
from distft.task.language_modeling import LanguageModeling


def task_of(job: Job, model_folder: Path) -> Task:
    """The task that the job names, with the model's tokenizer; loads transformers.

    Raises:
        DataError: The tokenizer has no end of text, is not of the fast kind, or lacks the chat template that the job's
            conversations need.
    """
    from distft.model import end_of_text_id, load_tokenizer, stop_ids  # a cache hit needs none of transformers

    tokenizer = load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code)
    task, max_tokens, overlong = job.task, job.data.max_tokens, job.data.overlong
    if task.kind == "classification":
        return Classification.from_tokenizer(
            tokenizer, max_tokens=max_tokens, overlong=overlong, text=task.text, label=task.label
        )
    end_of_text = end_of_text_id(tokenizer)
    if task.kind == "generation":
        return Generation.from_tokenizer(
            tokenizer,
            task,
            stops=stop_ids(tokenizer),
            end_of_text=end_of_text,
            max_tokens=max_tokens,
            overlong=overlong,
        )
    return LanguageModeling.from_tokenizer(
        tokenizer, end_of_text, max_tokens=max_tokens, overlong=overlong, column=task.text
    )


def prepare(job: Job, model_folder: Path, progress: Progress | None = None) -> Path:
    """The folder of the job's prepared data, built in this process if it is not there.

    Raises:
        DataError: The data cannot be used as it is.
        CapacityError: The disk is full.
    """
    return prepared_folder(job, model_folder, lambda: task_of(job, model_folder), progress=progress)

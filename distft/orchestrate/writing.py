"""What a run's models say: to a person's prompt, and to one of the data when the run ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distft import model as models
from distft.config import Job
from distft.data.store import Prepared, Row
from distft.errors import JobError
from distft.evaluation import Subject, Unit, questions, score
from distft.export import exported
from distft.orchestrate.data import Data
from distft.runs import Run, decision
from distft.task.generation import Generation
from distft.task.prepare import task_of
from distft.train.folder import job_of

#: The words of a document that both language models continue at the end of a run, and the tokens that models write.
SAMPLE_PROMPT_WORDS, SAMPLE_TOKENS = 16, 48


def generate(
    run: Run,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    model: str = "best",
) -> Iterator[str]:
    """Writes text with a run's exported model, or its base; yields it in pieces.

    A language model continues the prompt. A model that was trained to answer gets it as in training: as a user's turn
    of the chat template, or with the words that the job's own prompt ends with.

    Raises:
        JobError: The run has no exported model, or it is a classifier.
    """
    job = job_of(run)
    if job.task.kind == "classification":
        raise JobError(
            "a classifier writes no text",
            where=run.name,
            fix=f'ask it with transformers: pipeline("text-classification", model="{run.export}")(text)',
        )
    folder = exported(run) if model == "best" else models.materialise(job.model, job.folder)
    trust = job.model.trust_remote_code
    tokenizer = models.load_tokenizer(folder, trust_remote_code=trust)
    loaded = models.load_model(folder, models.DTYPES[decision(run, "model.dtype")], trust_remote_code=trust)
    task = task_of(job, folder) if job.task.kind == "generation" else None
    asked = task.opening_ids(prompt) if isinstance(task, Generation) else prompt
    yield from models.generate(
        loaded, tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def sample(job: Job, run: Run, data: Data) -> dict[str, str]:
    """What the models make of a validation row (a training one where there is none).

    Returns:
        ``prompt`` and, but for language modelling, ``reference`` (the data's answer or label) and what the models say
        of it, ``base`` and ``best``. A classifier has no base.
    """
    prepared = Prepared.open(data.prepared)
    split = next(split for split in ("validation", "train") if len(prepared.rows(split)))
    first = prepared.rows(split)[0]
    if job.task.kind == "classification":
        return _classified(run, first, prepared.labels)
    if job.task.kind == "generation":
        return _answered(job, run, data, split)
    text = models.load_tokenizer(data.model).decode(
        first.input_ids[: 4 * SAMPLE_PROMPT_WORDS], skip_special_tokens=True
    )
    prompt = " ".join(text.split()[:SAMPLE_PROMPT_WORDS])
    written = {
        model: "".join(generate(run, prompt, max_new_tokens=SAMPLE_TOKENS, seed=job.seed, model=model))
        for model in ("base", "best")
    }
    return {"prompt": prompt, **written}


def _classified(run: Run, row: Row, labels: tuple[str, ...]) -> dict[str, str]:
    """The row's first text with its label, and the likeliest labels with their probabilities."""
    import torch

    trust = job_of(run).model.trust_remote_code
    tokenizer = models.load_tokenizer(run.export, trust_remote_code=trust)
    dtype = models.DTYPES[decision(run, "model.dtype")]
    model = models.LossModel(models.load_classifier(run.export, dtype, trust_remote_code=trust)).eval()
    with torch.inference_mode():
        batch = models.Batch.collate([row], models.pad_id(tokenizer))
        chances = model.class_log_probabilities(batch)[0].exp().tolist()
    likeliest = sorted(range(len(labels)), key=lambda number: -chances[number])[:3]
    length = row.segments[0]
    return {
        "prompt": tokenizer.decode(row.input_ids[: length - 1], skip_special_tokens=True),
        "reference": labels[row.input_ids[length - 1]],
        "best": ", ".join(f"{labels[number]} {chances[number]:.2f}" for number in likeliest),
    }


def _answered(job: Job, run: Run, data: Data, split: str) -> dict[str, str]:
    """The first question of the split that a person asked in one turn, in those words, with both models' answers."""
    rows = Prepared.open(data.prepared).rows(split)
    task, tokenizer = task_of(job, data.model), models.load_tokenizer(data.model)
    assert isinstance(task, Generation)
    asked = {}
    for question in questions(rows, np.arange(min(len(rows), _LOOKED_AT))):
        text = tokenizer.decode(question.prompt)
        words = task.words_of(text)
        asked[text if words is None else words] = question
        if words is not None:
            break
    prompt, question = asked.popitem()
    written = {
        model: next(score(_subject(job, run, data, folder, split), [Unit(questions=(question,))])).written[0]
        for model, folder in (("base", data.model), ("best", run.export))
    }
    return {
        "prompt": prompt,
        "reference": written["best"].reference,
        **{model: one.answer for model, one in written.items()},
    }


_LOOKED_AT = 50  # rows


def _subject(job: Job, run: Run, data: Data, folder: Path, split: str) -> Subject:
    dtype = decision(run, "model.dtype")
    trust = job.model.trust_remote_code
    return Subject(folder, data.prepared, split, job.task.kind, dtype, (), SAMPLE_TOKENS, trust)

"""Running a model over its share of the work: losses, class probabilities, written answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distft.data.store import Prepared, Row, Rows
from distft.evaluation.bootstrap import DocumentScore
from distft.evaluation.units import Question, Unit
from distft.task.metrics import mean_statistics, token_statistics
from distft.task.metrics_classes import bin_statistics, class_statistics
from distft.task.metrics_text import text_statistics

if TYPE_CHECKING:
    from distft.model import Batch, LossModel


@dataclass(frozen=True)
class Subject:
    """A model and what it is scored on, as plain values that travel to other processes.

    Attributes:
        model: A Hugging Face folder that every node sees: the base model's or an export.
        prepared: The prepared data's folder.
        split: Which split.
        kind: The task's kind.
        dtype: The dtype the model was trained in, "bf16" or "fp32".
        metrics: Names of the metrics.
        max_new_tokens: The most tokens of an answer.
        trust_remote_code: As in the job file.
    """

    model: Path
    prepared: Path
    split: str
    kind: str
    dtype: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Written:
    """An answer that a model wrote.

    Attributes:
        document: The document's number in the prepared data.
        prompt: What was asked, special tokens shown.
        reference: The answer that the data gives.
        answer: The model's.
        stopped: Whether the model ended it.
        tokens: Its length, without the token that ended it.
    """

    document: int
    prompt: str
    reference: str
    answer: str
    stopped: bool
    tokens: int


@dataclass(frozen=True)
class Scored:
    """What came of one unit; ``written`` is empty where it had no questions."""

    scores: list[DocumentScore]
    written: list[Written]


def score(subject: Subject, work: Sequence[Unit]) -> Iterator[Scored]:
    """Does units of work one after the other with the subject's model, on this process's device.

    Raises:
        DataError: The model cannot be loaded, or the prepared data is damaged.
    """
    from distft.model import Batch, load_tokenizer, pad_id, token_bytes

    rows = Prepared.open(subject.prepared).rows(subject.split)
    model = _load(subject)
    tokenizer = load_tokenizer(subject.model, trust_remote_code=subject.trust_remote_code)
    padding, bytes_of = pad_id(tokenizer), token_bytes(tokenizer)
    for unit in work:
        scores: list[DocumentScore] = []
        for index in unit.rows:
            batch = Batch.collate([rows[index]], padding).to(model.model.device)
            if subject.kind == "classification":
                scores += _classified(model, rows[index], batch)
            else:
                scores += _read(model, rows[index], batch, bytes_of)
        written = _answered(subject, model, tokenizer, unit.questions) if unit.questions else []
        yield Scored(scores + [_judged(one, subject.metrics) for one in written], written)


def guesses(rows: Rows, indices: NDArray[np.int64], labels: Sequence[str], seen: Mapping[str, int]) -> list[Scored]:
    """What a classifier is compared with: every text gets each label's share of the training rows, its text unread.

    The base model has no classifier; one with a random head would be right as often as chance has it. Shares are
    those of one row more of each label than there are, so that none is impossible.

    Args:
        rows: The split's rows.
        indices: Which of them are scored.
        labels: The labels by their numbers.
        seen: Training rows of each label.
    """
    counts = np.array([seen.get(label, 0) + 1 for label in labels], dtype=np.float64)
    shares = np.log(counts / counts.sum())
    scored = [
        _class_score(document, truth, shares) for index in indices.tolist() for document, truth in _truths(rows[index])
    ]
    return [Scored(scored, [])]


def _load(subject: Subject) -> LossModel:
    import torch

    from distft.model import DTYPES, LossModel, load_classifier, load_model

    load = load_classifier if subject.kind == "classification" else load_model
    model = load(subject.model, DTYPES[subject.dtype], trust_remote_code=subject.trust_remote_code)
    return LossModel(model).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _read(model: LossModel, row: Row, batch: Batch, bytes_of: NDArray[np.int64]) -> list[DocumentScore]:
    """The losses of a row's segments; ``bytes_of`` are the bytes of each id."""
    losses = model.token_losses(batch)[0].double().cpu().numpy()
    scores, start = [], 0
    for document, length in zip(row.documents, row.segments, strict=True):
        end = start + length
        supervised = row.supervised[start:end]
        read = token_statistics(
            loss=float(losses[start:end].sum()),  # position t holds the loss of token t + 1: same segment
            tokens=int(supervised.sum()),
            text_bytes=int(bytes_of[row.input_ids[start:end][supervised]].sum()),
        )
        scores.append(DocumentScore(document, {"tokens": read}))
        start = end
    return scores


def _classified(model: LossModel, row: Row, batch: Batch) -> list[DocumentScore]:
    """What a classifier says of a row's segments."""
    chances = model.class_log_probabilities(batch).double().cpu().numpy()
    return [
        _class_score(document, truth, chance) for (document, truth), chance in zip(_truths(row), chances, strict=True)
    ]


def _truths(row: Row) -> list[tuple[int, int]]:
    """The document and the label's number of each segment: its last id."""
    ends = np.cumsum(row.segments) - 1
    return list(zip(row.documents, row.input_ids[ends].tolist(), strict=True))


def _class_score(document: int, truth: int, log_probabilities: NDArray[np.float64]) -> DocumentScore:
    predicted = int(log_probabilities.argmax())
    return DocumentScore(
        document,
        {
            "tokens": token_statistics(-float(log_probabilities[truth]), 1, 0),
            "classes": class_statistics(truth, predicted, len(log_probabilities)),
            "bins": bin_statistics(predicted == truth, float(np.exp(log_probabilities[predicted]))),
        },
    )


def _answered(subject: Subject, model: LossModel, tokenizer: Any, questions: Sequence[Question]) -> list[Written]:
    """Answers to a batch of questions."""
    from distft.model import answers, stop_ids

    prompts = [question.prompt.tolist() for question in questions]
    written = answers(model.model, tokenizer, prompts, subject.max_new_tokens)
    stops = stop_ids(tokenizer)
    return [
        Written(
            question.document,
            tokenizer.decode(prompt),
            tokenizer.decode([id for id in question.reference.tolist() if id not in stops], skip_special_tokens=True),
            tokenizer.decode(list(answer.ids), skip_special_tokens=True),
            answer.stopped,
            len(answer.ids),
        )
        for question, prompt, answer in zip(questions, prompts, written, strict=True)
    ]


def _judged(written: Written, names: Sequence[str]) -> DocumentScore:
    always = {"stop_rate": mean_statistics(written.stopped), "length": mean_statistics(written.tokens)}
    return DocumentScore(written.document, always | text_statistics(written.answer, written.reference, names))

"""The work of scoring a split, in units that do not depend on how many workers there are.

So each worker can be dealt any of them, and the scores stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distft.data.order import sampled_rows

if TYPE_CHECKING:
    from distft.data.store import Rows

ROWS_OF_A_UNIT = 8


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt of the data and the answer that the data gives: the last one, where a conversation has several.

    Attributes:
        document: The document's number in the prepared data.
        prompt: Token ids.
        reference: Token ids, with what ends the answer.
    """

    document: int
    prompt: NDArray[np.int32]
    reference: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Unit:
    """Rows to score, or questions to answer as one batch."""

    rows: tuple[int, ...] = ()
    questions: tuple[Question, ...] = ()


def units(rows: Rows, indices: NDArray[np.int64], *, samples: int, seed: int, max_new_tokens: int | None) -> list[Unit]:
    """All that there is to do for one model.

    Args:
        rows: The split's rows.
        indices: Which of them are scored.
        samples: The most questions.
        seed: Draws the questions where those rows hold more.
        max_new_tokens: The most tokens of an answer; None where no answers are wanted.
    """
    starts = range(0, len(indices), ROWS_OF_A_UNIT)
    result = [Unit(rows=tuple(indices[start : start + ROWS_OF_A_UNIT].tolist())) for start in starts]
    if max_new_tokens is not None:
        from distft.model import batches  # torch takes seconds to import; only answers need it

        found = questions(rows, indices)
        chosen = [found[index] for index in sampled_rows(len(found), samples, seed)]
        dealt = batches([len(question.prompt) for question in chosen], max_new_tokens)
        result += [Unit(questions=tuple(chosen[number] for number in batch)) for batch in dealt]
    return result


def deal(work: Sequence[Unit], workers: int) -> list[list[Unit]]:
    """The units of each worker, in turns; fewer shares where there are fewer units than workers."""
    return [list(work[worker::workers]) for worker in range(min(workers, len(work)))]


def questions(rows: Rows, indices: NDArray[np.int64]) -> list[Question]:
    """Every segment that has a prompt and an answer, in order."""
    result = []
    for index in indices.tolist():
        row = rows[index]
        ends = np.cumsum(row.segments).tolist()
        for document, length, end in zip(row.documents, row.segments, ends, strict=True):
            ids, supervised = row.input_ids[end - length : end], row.supervised[end - length : end]
            if not supervised.any():
                continue
            last = int(np.flatnonzero(supervised)[-1]) + 1
            context = np.flatnonzero(~supervised[:last])  # never empty: the first token is nobody's to predict
            first = int(context[-1]) + 1
            result.append(Question(document, ids[:first], ids[first:last]))
    return result

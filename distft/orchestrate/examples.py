"""What a person is shown of a scored split: its worst, middling and best documents, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft import evaluation
from distft import model as models
from distft.config import Job
from distft.data.store import Prepared
from distft.evaluation import DocumentScore, Written
from distft.runs import Run, read_json, write_json
from distft.task.metrics import headline

#: The tokens of a document that are shown.
SHOWN_TOKENS = 160


@dataclass(frozen=True)
class Results:
    """What scoring some models on a split gave.

    Attributes:
        split: The split.
        indices: Its rows that were scored.
        scored: Each model's scores, by document.
        written: Each model's answers, where it wrote any.
    """

    split: str
    indices: NDArray[np.int64]
    scored: Mapping[str, Sequence[DocumentScore]]
    written: Mapping[str, Sequence[Written]]


def write_examples(job: Job, run: Run, model_folder: Path, prepared: Prepared, results: Results) -> None:
    """Brings ``examples.json`` up to date with a split that the best model was scored on.

    A classifier's documents are told apart by their loss, since each is right or wrong alike.

    Args:
        job: The job.
        run: The run.
        model_folder: The base model, for its tokenizer.
        prepared: The data.
        results: What scoring gave.
    """
    if "best" not in results.scored:
        return
    wanted = "loss" if job.task.kind == "classification" else headline(job)
    found, metric = [], wanted
    for metric in (wanted, "loss"):
        found = evaluation.examples(results.scored["best"], results.scored.get("base", ()), metric)
        if found:
            break
    told = _Texts(job, model_folder, prepared, results)
    shown = [
        {
            "place": one.place,
            "source": prepared.document(one.document).source,
            "row": prepared.document(one.document).row,
            **told.of(one.document),
            "best_value": one.tuned,
            **({} if one.base is None else {"base_value": one.base}),
        }
        for one in found
    ]
    known = read_json(run.examples) if run.examples.exists() else {}
    count = len(results.scored["best"])
    write_json(run.examples, {**known, results.split: {"metric": metric, "documents": count, "examples": shown}})


class _Texts:
    """The words of scored documents."""

    def __init__(self, job: Job, model_folder: Path, prepared: Prepared, results: Results) -> None:
        self._tokenizer = models.load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code)
        self._labels = prepared.labels
        self._rows = prepared.rows(results.split)
        self._row_of = {one: int(index) for index in results.indices[::-1] for one in self._rows[index].documents}
        self._written = {
            model: {one.document: one for one in answers} for model, answers in results.written.items() if answers
        }
        self._best = {one.document: one for one in results.scored["best"]}

    def of(self, document: int) -> dict[str, Any]:
        """What was asked, what the data answers, and what the models do; of a language model the words it read."""
        answered = {model: answers[document] for model, answers in self._written.items() if document in answers}
        if answered:
            first = next(iter(answered.values()))
            return {
                "text": first.prompt,
                "reference": first.reference,
                **{model: one.answer for model, one in answered.items()},
            }
        row = self._rows[self._row_of[document]]
        end = int(np.cumsum(row.segments)[row.documents.index(document)])
        begin = end - row.segments[row.documents.index(document)]
        if not self._labels:
            ids = row.input_ids[begin : min(end, begin + SHOWN_TOKENS)]
            return {"text": self._tokenizer.decode(ids, skip_special_tokens=True)}
        predicted = self._best[document].statistics["classes"].reshape(3, -1)[2]
        return {
            "text": self._tokenizer.decode(row.input_ids[begin : end - 1], skip_special_tokens=True),
            "reference": self._labels[row.input_ids[end - 1]],
            "best": self._labels[int(predicted.argmax())],
        }

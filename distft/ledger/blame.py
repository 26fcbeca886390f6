"""Which rows a step's loss came from: each with its own loss, as training saw it, worst first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distft.data.store import Prepared, Row
from distft.errors import JobError, RunError
from distft.ledger.losses import recorded_losses
from distft.ledger.plan import Plan
from distft.runs import Run, training_curve

#: Tokens of a row that are read for its first words, and letters of them that are kept.
READ_TOKENS, EXCERPT = 80, 160


@dataclass(frozen=True)
class BlamedRow:
    """A row of a step.

    Attributes:
        row: Its number in the training split.
        loss: Its loss per supervised token; not finite where training met that, 0 where nothing is supervised.
        supervised_tokens: Its targets.
        share: Its part of the step's loss, 0 .. 1; None where the step's loss is not finite.
        sources: The file and the 1-based row of each of its documents.
        text: How its first document begins; behind an arrow a classifier's label.
    """

    row: int
    loss: float
    supervised_tokens: int
    share: float | None
    sources: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Blame:
    """The rows of a step.

    Attributes:
        step: The step.
        loss: Its loss per supervised token.
        skipped: Whether nothing was learnt from it.
        rows: All of its rows, worst first: those that are not finite, then by their loss per supervised token.
    """

    step: int
    loss: float
    skipped: bool
    rows: tuple[BlamedRow, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain values; a number that is not finite is None."""
        rows = [{**asdict(row), "loss": _finite(row.loss)} for row in self.rows]
        return {"step": self.step, "loss": _finite(self.loss), "skipped": self.skipped, "rows": rows}


def blame(plan: Plan, run: Run, model_folder: Path, step: int, *, trust_remote_code: bool = False) -> Blame:
    """The rows of a step with the losses that training had of them; no model is run.

    Args:
        plan: The run's plan.
        run: The run.
        model_folder: The base model's, for its tokenizer.
        step: The step, from 1.
        trust_remote_code: As in the job file.

    Raises:
        JobError: The run has not made that step.
        RunError: The losses of its rows were not kept, or its rows are not the planned ones.
    """
    record = _record(plan, run, step)
    chosen = plan.step(step)
    if record is not None and record["sample_digest"] != plan.digest(chosen):
        raise RunError("its rows are not the planned ones", where=f"step {step}", fix=f"distft audit {run.name}")
    losses = recorded_losses(run, plan, step)
    if losses is None:
        where = f"{run.row_losses.name}, step {step}"
        raise RunError("the losses of its rows were not kept", where=where, fix="look at another step")
    from distft.model import load_tokenizer

    tokenizer = load_tokenizer(model_folder, trust_remote_code=trust_remote_code)
    total = float(losses.sum(dtype=np.float64))
    blamed = [
        _blamed(plan.prepared, plan.rows[index], float(loss), total, lambda ids: str(tokenizer.decode(ids)))
        for index, loss in zip(chosen.tolist(), losses.tolist(), strict=True)
    ]
    return Blame(
        step,
        total / max(1, plan.rows.supervised_tokens(chosen)),
        bool(record is not None and record.get("skipped")),
        tuple(sorted(blamed, key=lambda row: (math.isfinite(row.loss), -row.loss if math.isfinite(row.loss) else 0))),
    )


def _record(plan: Plan, run: Run, step: int) -> dict[str, Any] | None:
    """The line of a step; None for a step that ended the run, of which there are losses only.

    Raises:
        JobError: The run has not made that step.
    """
    curve = {line["step"]: line for line in training_curve(run.metrics)}
    known = step in curve or (1 <= step <= plan.order.steps and recorded_losses(run, plan, step) is not None)
    if not known or not 1 <= step <= plan.order.steps:
        made = f"it has made steps 1 to {max(curve):,}" if curve else "it has made no step"
        raise JobError(f"the run has not made step {step:,}", where="--step", fix=f"{made}, of {plan.order.steps:,}")
    return curve.get(step)


def _blamed(prepared: Prepared, row: Row, loss: float, total: float, decode: Callable[[list[int]], str]) -> BlamedRow:
    supervised = int(row.supervised.sum())
    found = [prepared.document(number) for number in row.documents]
    return BlamedRow(
        row.index,
        loss / max(1, supervised),
        supervised,
        (loss / total if total else 0.0) if math.isfinite(total) else None,
        tuple(f"{document.source}:{document.row}" for document in found),
        _excerpt(prepared, row, decode),
    )


def _excerpt(prepared: Prepared, row: Row, decode: Callable[[list[int]], str]) -> str:
    ids = row.input_ids[: row.segments[0]].tolist()
    label = prepared.labels[ids.pop()] if prepared.labels else None
    text = " ".join(decode(ids[:READ_TOKENS]).split())
    text = text if len(text) <= EXCERPT and len(ids) <= READ_TOKENS else f"{text[: EXCERPT - 1]}…"
    return text if label is None else f"{text} → {label}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Whether a run used every training row once an epoch: its log held against its plan (invariants 1 and 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.errors import JobError
from distft.ledger.losses import recorded_losses
from distft.ledger.plan import Plan
from distft.runs import Run, read_lines

#: How far a step's loss may be from the sum of its rows' losses, which are kept in fp32.
LOSS_TOLERANCE = 1e-5

Record = Mapping[str, Any]
Steps = Mapping[int, NDArray[np.int64]]

_NONE = np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Disagreement:
    """A step whose log is not what was planned.

    Attributes:
        step: The step.
        problem: What is wrong, for a person.
        expected: The planned ``sample_digest``; None where no such step was planned.
        recorded: The logged one; None where there is none.
        rows: The planned rows.
    """

    step: int
    problem: str
    expected: str | None
    recorded: str | None
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Epoch:
    """How often the rows of an epoch were used.

    Attributes:
        number: The epoch, from 1.
        rows: Rows that were to be used so far.
        once: Rows used exactly once.
        more: Rows used more than once.
        never: Rows that were to be used and were not.
        left_out: Rows of steps that were skipped because their loss was no number.
    """

    number: int
    rows: int
    once: int
    more: int
    never: int
    left_out: int


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        steps: The last step that the run made.
        planned: Steps that it was to make.
        rows: Training rows.
        finished: Whether the run ended by itself, be it by patience.
        epochs: Each epoch that was begun.
        redone: Steps made more than once, after a kill; the last line of each stands.
        resizes: (step, workers before, workers from then on).
        skipped: Steps that were left out because their loss was no number.
        losses_checked: Steps whose loss was compared with the sum of its rows' losses.
        disagreements: Steps that are not as planned, in order.
    """

    steps: int
    planned: int
    rows: int
    finished: bool
    epochs: tuple[Epoch, ...]
    redone: tuple[int, ...]
    resizes: tuple[tuple[int, int, int], ...]
    skipped: tuple[int, ...]
    losses_checked: int
    disagreements: tuple[Disagreement, ...]

    @property
    def sound(self) -> bool:
        """Whether every row was used as planned."""
        return not self.disagreements and all(epoch.more == epoch.never == 0 for epoch in self.epochs)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"sound": self.sound, **asdict(self)}


def audit(plan: Plan, run: Run) -> Audit:
    """Holds a run's ``metrics.jsonl`` against its plan.

    Each step's rows are computed again from data and seed, and their digest compared with the logged one. Rows are
    counted as the log tells: where a digest is that of another step, it is that step's rows that were used.

    Args:
        plan: What was to be used.
        run: The run, finished or not.

    Raises:
        JobError: The run has made no step.
    """
    lines = list(read_lines(run.metrics))
    made = [line for line in lines if line.get("kind") == "train"]
    if not made:
        raise JobError("the run has made no step: there is nothing to audit", where=str(run.metrics))
    times = Counter(line["step"] for line in made)
    standing: dict[int, Record] = {line["step"]: line for line in made}
    records = [standing[step] for step in sorted(standing)]
    chosen = dict(enumerate(plan.order.first(max(standing)), start=1))
    used, found = _compare(plan, standing, chosen)
    losses = _losses(plan, run, standing, chosen)
    skipped = frozenset(record["step"] for record in records if record.get("skipped"))
    return Audit(
        steps=max(standing),
        planned=plan.order.steps,
        rows=len(plan.rows),
        finished=any(line.get("event") == "finished" for line in lines),
        epochs=tuple(_epochs(plan, used, chosen, skipped)),
        redone=tuple(step for step in sorted(times) if times[step] > 1),
        resizes=tuple(_resizes(records)),
        skipped=tuple(sorted(skipped)),
        losses_checked=0 if losses is None else len(standing) - len(skipped),
        disagreements=tuple(sorted([*found, *(losses or [])], key=lambda one: one.step)),
    )


def _compare(plan: Plan, standing: Mapping[int, Record], chosen: Steps) -> tuple[dict[int, int], list[Disagreement]]:
    """For each step that was learnt from and whose rows are known, whose they are; and steps that are not as planned.

    Args:
        plan: What was to be used.
        standing: The line that stands of each step.
        chosen: The planned rows of each step up to the last one made.
    """
    used: dict[int, int] = {}
    found = []
    owners: dict[str, int] | None = None
    for step in range(1, max(standing) + 1):
        record = standing.get(step)
        expected = plan.digest(chosen[step]) if step in chosen else None
        recorded = None if record is None else str(record["sample_digest"])
        owner: int | None = step
        if expected is None:
            problem = f"the plan ends at step {plan.order.steps}"
        elif recorded is None:
            problem = "the log has no such step"
        elif recorded != expected:
            owners = owners or {
                plan.digest(rows): one for one, rows in enumerate(plan.order.first(plan.order.steps), start=1)
            }
            owner = owners.get(recorded)
            problem = "its rows are not the planned ones" + ("" if owner is None else f", but those of step {owner}")
        else:
            problem = ""
        if problem:
            found.append(Disagreement(step, problem, expected, recorded, tuple(chosen.get(step, _NONE).tolist())))
        if owner is not None and owner in chosen and record is not None and not record.get("skipped"):
            used[step] = owner
    return used, found


def _epochs(plan: Plan, used: Mapping[int, int], chosen: Steps, skipped: Container[int]) -> Iterator[Epoch]:
    """Counts the uses of each row in each epoch that was begun."""
    reached = sum(len(rows) for rows in chosen.values())
    shape = -(-reached // plan.order.rows), plan.order.rows
    uses, due, left_out = np.zeros(shape, dtype=np.uint16), np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for step, rows in chosen.items():
        (left_out if step in skipped else due)[_epochs_of(plan, step, len(rows)), rows] = True
        if step in used:
            rows = chosen[used[step]]
            np.add.at(uses, (_epochs_of(plan, step, len(rows)).clip(max=shape[0] - 1), rows), 1)
    for number, (counts, wanted, missed) in enumerate(zip(uses, due, left_out, strict=True), start=1):
        yield Epoch(
            number,
            rows=int((wanted | missed).sum()),
            once=int((counts == 1).sum()),
            more=int((counts > 1).sum()),
            never=int((wanted & (counts == 0)).sum()),
            left_out=int(missed.sum()),
        )


def _epochs_of(plan: Plan, step: int, rows: int) -> NDArray[np.int64]:
    """The 0-based epoch of each of a step's rows, (rows,)."""
    return (np.arange(rows) + (step - 1) * plan.order.batch_size) // plan.order.rows


def _resizes(records: Sequence[Record]) -> Iterator[tuple[int, int, int]]:
    for before, after in pairwise(records):
        if before["world_size"] != after["world_size"]:
            yield after["step"], before["world_size"], after["world_size"]


def _losses(plan: Plan, run: Run, standing: Mapping[int, Record], chosen: Steps) -> list[Disagreement] | None:
    """Steps whose loss is not what the losses of their rows add up to; None where no losses of rows were kept."""
    if not run.row_losses.exists():
        return None
    found = []
    for step, rows in chosen.items():
        record = standing.get(step)
        if record is None or record.get("skipped"):
            continue
        losses = recorded_losses(run, plan, step)
        supervised = max(1, plan.rows.supervised_tokens(rows))
        mean = float("nan") if losses is None else float(losses.sum(dtype=np.float64)) / supervised
        if not abs(mean - record["loss"]) <= LOSS_TOLERANCE * abs(record["loss"]):
            problem = f"the losses of its rows give a loss of {mean:.6g}, the log says {record['loss']:.6g}"
            found.append(Disagreement(step, problem, plan.digest(rows), record["sample_digest"], tuple(rows.tolist())))
    return found

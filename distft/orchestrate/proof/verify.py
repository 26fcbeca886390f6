"""``distft verify``: proves the contract's invariants 1 to 3 on a job, made small, by training it in many ways.

Every way is compared with the plain engine in fp64, which trains row by row and shares neither the training loop nor
ZeRO with it.
"""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import RunError
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.proof import trial as trials
from distft.orchestrate.proof.ranks import run_ranks
from distft.orchestrate.proof.trial import KILLED_AFTER, STEPS, Case, Trial
from distft.runs import training_curve

#: The largest relative error of loss and gradient norm in fp32 (contract, invariant 2).
BOUND = 1e-5

#: Every stage on every number of workers. Of all other pairs of settings each stands in one of them at least, so that
#: a fault of any two settings together shows without the 72 cases that there are.
CASES = (
    Case(1, 0, 1, True), Case(1, 1, 2, False), Case(1, 2, 3, True), Case(1, 3, 1, False),
    Case(2, 0, 2, False), Case(2, 1, 3, True), Case(2, 2, 1, False), Case(2, 3, 2, True),
    Case(3, 0, 3, False), Case(3, 1, 1, True), Case(3, 2, 2, False), Case(3, 3, 3, True),
)  # fmt: skip

#: What is killed, and how it goes on: as it was, and on more and on fewer workers at other stages.
KILLED = Case(2, 3, 2, True)
RESUMED = (KILLED, Case(3, 1, 2, True), Case(1, 0, 2, True))


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Attributes:
        case: How it was trained; after the kill, where it was killed.
        killed: The case that it was until it was killed; None where it was not.
        loss: The largest relative error of the loss over the steps; NaN where steps are missing.
        grad_norm: That of the gradient norm.
        same_rows: Whether every step's ``sample_digest`` is the planned one.
        same_digits: Whether it is digit for digit the undisturbed run; None where it was not to be compared.
        problems: What is wrong, each with the name of the invariant; empty where all is well.
    """

    case: Case
    killed: Case | None
    loss: float
    grad_norm: float
    same_rows: bool
    same_digits: bool | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """What ``verify`` found.

    Attributes:
        results: One for each case.
        rows: Training rows with packing and without.
        bound: What errors must stay below.
        steps: Steps of each run.
    """

    results: tuple[Result, ...]
    rows: dict[str, int]
    bound: float = BOUND
    steps: int = STEPS

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, with where."""
        return [f"{named(result)}: {problem}" for result in self.results for problem in result.problems]

    def as_json(self) -> dict[str, Any]:
        """As plain values; a number that is not finite is None."""
        values = asdict(self)
        for result in values["results"]:
            for name in ("loss", "grad_norm"):
                result[name] = result[name] if math.isfinite(result[name]) else None
        return {"holds": not self.problems, **values}


def verify(job: Job, listener: Listener = SILENT) -> Proof:
    """Trains the job, made small, in many ways in processes of this machine; no Ray and no GPU.

    Args:
        job: The job. Its model is replaced by a small one of the same architecture, its data by a part of it.
        listener: Who is told how far it is.

    Raises:
        DataError: The model or the data cannot be used.
        RunError: A process ended for another reason than the planned kill.
    """
    from distft.model import materialise

    listener.stage("model and data")
    with tempfile.TemporaryDirectory(prefix="distft-verify-") as temporary:
        trial = trials.make_trial(job, materialise(job.model, job.folder), Path(temporary))
        return prove(trial, listener=listener)


def prove(
    trial: Trial,
    cases: Sequence[Case] = CASES,
    resumed: Sequence[Case] = RESUMED,
    plant: Callable[[], None] | None = None,
    listener: Listener = SILENT,
) -> Proof:
    """Trains the cases and compares them.

    Args:
        trial: The small job.
        cases: How to train; the killed one among them, where any are resumed.
        resumed: How to go on with the killed one.
        plant: Called on every rank before it trains, to plant a fault.
        listener: Who is told how far it is.
    """
    work = _Work(trial, plant, listener, _steps(cases, resumed))
    listener.stage("train")
    work.on(2, trials.train_reference, (trial,))
    for workers in (1, 2, 3):
        mine = [(_name(case), case) for case in cases if case.workers == workers]
        if mine:
            work.on(workers, trials.train, (trial, mine, plant))
    if resumed:
        statuses = work.on(KILLED.workers, trials.train_until_killed, (trial, "killed", KILLED))
        if -signal.SIGKILL not in statuses:
            raise RunError("no rank was killed", where="verify")
        for case in resumed:
            shutil.copytree(trial.run("killed").folder, trial.run(_name(case, KILLED)).folder)
        for case in resumed:
            work.on(case.workers, trials.train, (trial, [(_name(case, KILLED), case)], plant))
    listener.progress(work.steps, work.steps)
    results = [_result(trial, case, None) for case in cases] + [_result(trial, case, KILLED) for case in resumed]
    return Proof(tuple(results), {"packed": _rows(trial, True), "apart": _rows(trial, False)})


@dataclass
class _Work:
    """Runs groups of ranks and tells how many of all steps are made."""

    trial: Trial
    plant: Callable[[], None] | None
    listener: Listener
    steps: int
    groups: int = field(default=0)

    def on(self, workers: int, work: Callable[..., None], args: Sequence[object]) -> list[int]:
        self.groups += 1
        return run_ranks(work, workers, args, self.trial.runs / f"logs-{self.groups}", self._tell)

    def _tell(self) -> None:
        made = sum(len(training_curve(path)) for path in self.trial.runs.glob("*/metrics.jsonl"))
        self.listener.progress(min(made, self.steps), self.steps)


def _steps(cases: Sequence[Case], resumed: Sequence[Case]) -> int:
    """Lines that there will be: both references, the cases, the killed one, and what goes on from its copies."""
    return STEPS * (2 + len(cases) + len(resumed)) + (KILLED_AFTER if resumed else 0)


def _name(case: Case, killed: Case | None = None) -> str:
    parts = f"{case.workers}-{case.stage}-{case.micro_batch_size}-{'packed' if case.packing else 'apart'}"
    return parts if killed is None else f"{_name(killed)}-then-{parts}"


def named(result: Result) -> str:
    """A case for a person."""
    case = result.case
    workers = f"{case.workers} worker{'' if case.workers == 1 else 's'}"
    packing = "packed" if case.packing else "not packed"
    text = f"{workers}, ZeRO {case.stage}, micro-batch {case.micro_batch_size}, {packing}"
    return text if result.killed is None else f"{text}, after a kill on {result.killed.workers} at ZeRO {KILLED.stage}"


def _result(trial: Trial, case: Case, killed: Case | None) -> Result:
    """Compares a run with the reference, and one that was killed as it was with the undisturbed one."""
    from distft.data.store import Prepared
    from distft.ledger.audit import audit
    from distft.ledger.plan import Plan

    run = trial.run(_name(case, killed))
    curve, reference = training_curve(run.metrics), training_curve(trial.reference(case.packing).metrics)
    loss, loss_step = _furthest(curve, reference, "loss")
    norm, norm_step = _furthest(curve, reference, "grad_norm")
    problems = []
    found = audit(Plan.of(trial.job_of(case), Prepared.open(trial.prepared[case.packing])), run)
    problems += [f"invariant 1 (order): step {one.step}: {one.problem}" for one in found.disagreements[:1]]
    for what, error, step in (("loss", loss, loss_step), ("gradient norm", norm, norm_step)):
        if not error <= BOUND:
            problems.append(f"invariant 2 (loss): the {what} is off by {error:.1e} at step {step}")
    same = None
    if case == killed:
        undisturbed = training_curve(trial.run(_name(case)).metrics)
        other = [one["step"] for one, two in zip(undisturbed, curve, strict=False) if _digits(one) != _digits(two)]
        same = not other and len(undisturbed) == len(curve)
        if not same:
            problems.append(f"invariant 2 (loss): other digits than undisturbed, first at step {(other or ['?'])[0]}")
    if len(curve) < STEPS or not found.sound:
        problems.append(f"invariant 3 (nothing lost): {len(curve)} of {STEPS} steps were made")
    rows = [step["sample_digest"] for step in curve] == [step["sample_digest"] for step in reference]
    return Result(case, killed, loss, norm, rows, same, tuple(problems))


def _digits(step: dict[str, Any]) -> tuple[Any, ...]:
    return step["loss"], step["grad_norm"], step["sample_digest"]


def _furthest(curve: list[dict[str, Any]], reference: list[dict[str, Any]], column: str) -> tuple[float, int]:
    """The largest relative error of a column and its step; NaN where the curves have not the same steps."""
    if [step["step"] for step in curve] != [step["step"] for step in reference]:
        return math.nan, len(curve)
    errors = [
        (abs(mine[column] - true[column]) / max(abs(true[column]), 1e-30), mine["step"])
        for mine, true in zip(curve, reference, strict=True)
    ]
    return max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])


def _rows(trial: Trial, packing: bool) -> int:
    from distft.data.store import Prepared

    return len(Prepared.open(trial.prepared[packing]).rows("train"))

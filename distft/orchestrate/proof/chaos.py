"""``distft chaos``: runs a job while taking away its workers, nodes and driver, and tells what that cost.

The run is an ordinary ``distft train`` in a process of its own, on a cluster started for it; what is done to it, and
when, is drawn from a seed.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import JobError
from distft.ledger.audit import Audit, audit
from distft.ledger.goodput import Goodput, goodput
from distft.ledger.plan import plan_of
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.proof import faults
from distft.orchestrate.proof.disturbance import Disturbance, Driver, Struck, aftermath
from distft.runs import Run, decision, read_lines, training_curve
from distft.train.folder import job_of

#: The largest relative difference of a loss where the number of workers was another for a while (contract, 2).
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """A run's losses beside those of an undisturbed one.

    Attributes:
        difference: The largest relative one.
        bound: What it must not exceed: 0 where the number of workers never changed.
    """

    difference: float
    bound: float


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        run: The run's folder.
        seed: What everything was drawn from.
        struck: What was done, in order.
        left_out: What was not done, and why.
        goodput: Where the time went.
        audit: Which rows were used.
        comparison: With an undisturbed run, where there is one.
        problems: What did not survive; empty where all is well.
    """

    run: str
    seed: int
    struck: tuple[Struck, ...]
    left_out: tuple[str, ...]
    goodput: Goodput
    audit: Audit
    comparison: Comparison | None
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        share = {"share": self.goodput.share, **asdict(self.goodput)}
        return {"survived": not self.problems, **asdict(self), "goodput": share, "audit": self.audit.as_json()}


def compare(curve: Sequence[dict[str, Any]], undisturbed: Sequence[dict[str, Any]], bound: float) -> Comparison:
    """How far a run's losses are from an undisturbed one's, step by step.

    Args:
        curve: The training steps that stand.
        undisturbed: Those of the other run.
        bound: What is allowed where the number of workers was not the same all the time.
    """
    difference = 0.0 if len(curve) == len(undisturbed) else float("inf")
    for ours, theirs in zip(curve, undisturbed, strict=False):
        for name in ("loss", "grad_norm"):
            if ours[name] != theirs[name]:
                known = ours[name] is not None and theirs[name]
                apart = abs(ours[name] - theirs[name]) / abs(theirs[name]) if known else float("inf")
                difference = max(difference, apart)
    sizes = {line["world_size"] for line in (*curve, *undisturbed)}
    return Comparison(difference, 0.0 if len(sizes) == 1 else bound)


def chaos(
    path: Path,
    overrides: Sequence[str],
    *,
    runs: Path,
    kills: int,
    name: str | None = None,
    seed: int | None = None,
    reference: bool = False,
    yes: bool = False,
    listener: Listener = SILENT,
) -> Report:
    """Runs a job while things are done to it, and proves that nothing was lost.

    Args:
        path: The job file.
        overrides: Settings in place of the file's, each ``dotted.key=value``.
        runs: The folder that runs are kept in.
        kills: How many faults.
        name: The run's name; the job's with ``-chaos`` where it is None.
        seed: What they are drawn from; drawn itself where it is None.
        reference: Run the job once more, undisturbed, and compare the losses.
        yes: Go on where the job names a cluster: one that others may use too.
        listener: Who is told.

    Raises:
        JobError: The run exists already, the job names a cluster, or it has fewer steps than faults.
        RunError: The run failed before anything was done to it, or the undisturbed one did.
    """
    job = Job.load(path, overrides)
    run = Run((runs / (name or f"{job.name}-chaos")).resolve())
    undisturbed = Run(run.folder.with_name(f"{run.name}-undisturbed"))
    for one in (run, undisturbed) if reference else (run,):
        if one.folder.exists():
            raise JobError(f"the run {one.name!r} exists already", where=str(one.folder), fix="take another --name")
    seed = random.randrange(2**32) if seed is None else seed
    with _cluster(job, yes, listener) as nodes:

        def driver(of: Run) -> Driver:
            # Each fault counts as a failure, and none of them is the job's own.
            settings = [*overrides, f"cluster.max_failures={job.cluster.max_failures + kills}"]
            settings += [f"cluster.address={nodes.address}"] if nodes else []
            words = [sys.executable, "-m", "distft", "train", str(path), "--name", of.name, "--runs", str(runs)]
            return Driver([*words, *(word for one in settings for word in ("--set", one))], of.logs / "driver.log")

        listener.stage(f"train, with {kills} faults (seed {seed})")
        disturbed = Disturbance(job, run, driver(run), nodes, kills, seed, listener)
        disturbed.train()
        if reference:
            listener.stage("train, undisturbed")
            driver(undisturbed).run()
    return _report(disturbed, run, undisturbed if reference else None, seed)


def _report(disturbed: Disturbance, run: Run, undisturbed: Run | None, seed: int) -> Report:
    """What came of it, from the files of the runs."""
    lines = list(read_lines(run.metrics))
    used, curve = audit(plan_of(job_of(run), run), run), training_curve(run.metrics)
    problems = [] if disturbed.failure is None else [f"the run did not survive: {disturbed.failure}"]
    if not used.sound or not used.finished:
        problems.append("not every row was used once an epoch, in the planned order: distft audit tells which")
    comparison = None
    if undisturbed is not None:
        bound = BOUNDS[decision(run, "model.dtype")]
        comparison = compare(curve, training_curve(undisturbed.metrics), bound)
        if not comparison.difference <= comparison.bound:
            problems.append(f"losses differ from those of the undisturbed run by up to {comparison.difference:.1e}")
    return Report(
        run=str(run.folder),
        seed=seed,
        struck=tuple(aftermath(one, lines) for one in disturbed.struck),
        left_out=tuple(disturbed.left_out),
        goodput=goodput(lines),
        audit=used,
        comparison=comparison,
        problems=tuple(problems),
    )


@contextlib.contextmanager
def _cluster(job: Job, yes: bool, listener: Listener) -> Iterator[faults.Nodes | None]:
    """A cluster of the run's own; None where the job names one."""
    address = job.cluster.address
    if address in ("auto", "local"):
        listener.stage("cluster")
        with faults.own_cluster(job) as nodes:
            yield nodes
        return
    if not yes:
        raise JobError(
            f"{address!r} is a cluster that was not started for this",
            where="cluster.address",
            fix="set cluster.address: auto for one on this machine, or say --yes: only this run is disturbed",
        )
    yield None

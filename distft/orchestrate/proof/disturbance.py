"""A run that things are done to: what is drawn for it, when each is due, and what it cost."""

from __future__ import annotations

import itertools
import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from distft.config import Job
from distft.errors import JobError, RunError
from distft.ledger.goodput import BEGINNINGS
from distft.orchestrate.listener import Listener
from distft.orchestrate.proof import faults
from distft.runs import Run, read_new_lines

Record = dict[str, Any]

#: What is done to a run. ``flip``: a byte of its newest checkpoint is changed, then a worker is killed.
Kind = Literal["worker", "driver", "node", "flip", "disk"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: How long a node stays away, and how long the driver.
NODE_SECONDS, DRIVER_SECONDS = 10.0, 1.0


@dataclass(frozen=True)
class Fault:
    """Something that is to be done to a run.

    Attributes:
        kind: What.
        step: Once this step is made.
        delay: That share of a step later.
        draws: From [0, 1): to whom of several, and where.
    """

    kind: Kind
    step: int
    delay: float
    draws: tuple[float, float, float]


@dataclass(frozen=True)
class Struck:
    """Something that was done to a run, and what it cost.

    Attributes:
        kind: What.
        step: The last step made before.
        time: When, in seconds since the epoch.
        what: The same for people.
        steps_lost: Steps that had to be made again.
        seconds: Until the next step was made; after a full disk, until the next checkpoint was written. None: never.
    """

    kind: Kind
    step: int
    time: float
    what: str
    steps_lost: int = 0
    seconds: float | None = None


def plan(seed: int, kills: int, steps: int, kinds: Sequence[Kind], checkpoint_every: int) -> list[Fault]:
    """What is to be done when: the same for the same seed. Every kind comes once before one comes again.

    Args:
        seed: Of the draws.
        kills: How many faults.
        steps: Of the run.
        kinds: Those that can be done.
        checkpoint_every: Steps from one checkpoint to the next: a full disk must be seen by one that is not the last.

    Raises:
        JobError: There are not so many steps.
    """
    if not 0 < kills < steps:
        raise JobError(
            f"{kills} faults do not fit into {steps} steps", where="--kills", fix=f"give a number from 1 to {steps - 1}"
        )
    draw = random.Random(seed)
    decks = (draw.sample(kinds, len(kinds)) for _ in itertools.count())
    drawn = list(itertools.islice(itertools.chain.from_iterable(decks), kills))
    found = []
    for step, kind in zip(sorted(draw.sample(range(1, steps), kills)), drawn, strict=True):
        in_time = kind != "disk" or step + 2 * checkpoint_every <= steps
        draws = (draw.random(), draw.random(), draw.random())
        found.append(Fault(kind if in_time else "worker", step, draw.random(), draws))
    return found


def aftermath(struck: Struck, lines: Sequence[Record]) -> Struck:
    """Adds what a fault cost, from the run's ``metrics.jsonl``."""
    after = [line for line in lines if line["time"] > struck.time]
    if struck.kind == "disk":
        saved = next((line["time"] for line in after if line.get("event") == "checkpoint"), None)
        return replace(struck, seconds=None if saved is None else saved - struck.time)
    begun = next((line for line in after if line.get("event") in BEGINNINGS), None)
    if begun is None:
        return struck
    again = next((line for line in after[after.index(begun) :] if line["kind"] == "train"), None)
    made = [line["step"] for line in lines[: lines.index(begun)] if line["kind"] == "train"]
    lost = max(made[-1] - begun["step"], 0) if made else 0
    seconds = None if again is None else again["time"] - struck.time
    return replace(struck, steps_lost=lost, seconds=seconds)


class Driver:
    """``distft train`` as a process: the run's driver.

    Args:
        command: Its words.
        log: Where what it says goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = list(command), log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Starts it; Ctrl-C on the terminal does not reach it."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            command = [*self._command, *more]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    def run(self) -> None:
        """Starts it, and waits for its end.

        Raises:
            RunError: It failed.
        """
        self.start()
        assert self._process is not None
        try:
            if self._process.wait():
                raise RunError(f"the undisturbed run failed: {self.said()}")
        finally:
            self.kill()

    def kill(self) -> str:
        """Ends it (SIGKILL); returns what was done."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return f"driver killed (pid {self._process.pid})"

    def said(self) -> str:
        """The error that it ended with."""
        return self._log.read_text(encoding="utf-8", errors="replace").rpartition("distft: ")[2].strip()


class Disturbance:
    """A run that things are done to.

    Args:
        job: The job.
        run: The run.
        driver: Its driver, not yet started.
        nodes: Its cluster, where it was started here.
        kills: How many faults.
        seed: What they are drawn from.
        listener: Who is told.
    """

    def __init__(
        self, job: Job, run: Run, driver: Driver, nodes: faults.Nodes | None, kills: int, seed: int, listener: Listener
    ) -> None:
        self._job, self._run, self._driver, self._nodes = job, run, driver, nodes
        self._kills, self._seed, self._listener = kills, seed, listener
        reasons: Mapping[Kind, str | None] = {
            "node": None if nodes else "the cluster was not started here",
            "flip": None if faults.checkpoints_folder(job, run) else "the checkpoints lie in a bucket",
            "disk": faults.why_not_fill(job, run),
        }
        self.left_out = [f"{kind}: {why}" for kind, why in reasons.items() if why]
        self._kinds = [kind for kind in KINDS if not reasons.get(kind)]
        self._lines: list[Record] = []
        self._offset = 0
        self._coming: list[Fault] | None = None
        self._seen = 0  # lines that were there when the last fault was done
        self._due: float | None = None
        self._mend: tuple[float, Kind] | None = None  # what comes back, and when
        self._filled: Path | None = None
        self.struck: list[Struck] = []
        self.failure: str | None = None

    def train(self) -> None:
        """Runs the job to its end.

        Raises:
            RunError: It failed before anything was done to it.
        """
        self._driver.start()
        try:
            while not self._ended():
                time.sleep(0.05)
                records, self._offset = read_new_lines(self._run.metrics, self._offset)
                self._lines += records
                for record in records:
                    self._listener.record(record)
                self._bring_back()
                self._strike()
        finally:
            if self._driver.status is None:
                self._driver.kill()
            if self._filled:
                self._filled.unlink(missing_ok=True)
        self.failure = self._driver.said() if self._driver.status else None
        if self.failure is not None and not self.struck:
            raise RunError(f"the run failed before anything was done to it: {self.failure}")
        self.left_out += [f"{fault.kind} at step {fault.step}: the run ended first" for fault in self._coming or ()]

    def _ended(self) -> bool:
        return self._driver.status is not None and not (self._mend and self._mend[1] == "driver")

    def _bring_back(self) -> None:
        """The driver or a node again, when it is time; the disk's space, once a save has met that it is full."""
        if self._mend and time.monotonic() > self._mend[0]:
            kind, self._mend = self._mend[1], None
            if kind == "driver":
                self._driver.start("--resume")
            elif self._nodes:
                self._nodes.give()
        tried = any(line.get("event") in ("checkpoint", "checkpoint_failed") for line in self._lines[self._seen :])
        if self._filled and tried:
            self._filled.unlink()
            self._filled = None

    def _strike(self) -> None:
        """Does the next fault, when it is time."""
        attempt = self._attempt()
        made = [line for line in attempt if line["kind"] == "train"]
        if not made or self._mend or self._filled or self._driver.status is not None:
            return
        if self._coming is None:
            steps = made[-1]["steps"]
            every = self._job.checkpoint.every.steps(steps)
            self._coming = plan(self._seed, self._kills, steps, self._kinds, every)
        if not self._coming or made[-1]["step"] < self._coming[0].step:
            return
        fault = self._coming[0]
        self._due = self._due or time.monotonic() + fault.delay * made[-1]["step_seconds"]
        if time.monotonic() < self._due:
            return
        now = time.time()
        what = self._do(fault)
        if what is None:  # there is nobody to do it to just now
            return
        self._coming, self._due, self._seen = self._coming[1:], None, len(self._lines)
        self.struck.append(Struck(fault.kind, made[-1]["step"], now, what))
        self._listener.note(f"  step {made[-1]['step']:,}  {what}")

    def _attempt(self) -> list[Record]:
        """The lines of the workers that train now; none before they have begun anew after the last fault."""
        first = self._seen if self.struck and self.struck[-1].kind != "disk" else 0
        begun = [n for n, line in enumerate(self._lines) if n >= first and line.get("event") in BEGINNINGS]
        return self._lines[begun[-1] :] if begun else []

    def _do(self, fault: Fault) -> str | None:
        """Does a fault; what was done, or None where it cannot be done now."""
        if fault.kind == "driver":
            self._mend = (time.monotonic() + DRIVER_SECONDS, "driver")
            return self._driver.kill()
        if fault.kind == "node":
            assert self._nodes
            self._mend = (time.monotonic() + NODE_SECONDS, "node")
            return self._nodes.take(fault.draws[0])
        if fault.kind == "disk":
            root = faults.checkpoints_folder(self._job, self._run)
            assert root
            self._filled = faults.fill(root)
            return f"disk filled ({self._filled.parent})"
        worker = faults.worker_of(self._run, fault.draws[0])
        if worker is None:
            return None
        if fault.kind == "worker":
            return faults.kill(worker)
        changed = faults.flip_byte(self._job, self._run, fault.draws)
        return f"{changed}, {faults.kill(worker)}" if changed else None

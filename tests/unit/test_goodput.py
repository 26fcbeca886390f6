"""Where a run's time went: histories whose truth is known, made up by a simulation of training that is killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.ledger.goodput import BEGINNINGS, PARTS, goodput

SECONDS = st.floats(0.0, 30.0)
STEPS = 9


@dataclass
class History:
    """A run on a clock of its own: what it writes, and what really happened to the time."""

    draw: st.DataObject
    now: float = 1_000_000.0
    lines: list[dict[str, Any]] = field(default_factory=list)
    truth: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    done: dict[tuple[str, int], float] = field(default_factory=dict)
    lost: float = 0.0
    next: str = "start"

    def spend(self, part: str | None = None) -> float:
        """Lets a drawn time go by, for a part or for something that is not told yet."""
        seconds = self.draw.draw(SECONDS)
        self.now += seconds
        if part is not None:
            self.truth[part] += seconds
        return seconds

    def write(self, kind: str, step: int, **fields: Any) -> None:
        self.lines.append({"kind": kind, "time": self.now, "step": step, **fields})

    def event(self, name: str, step: int, **fields: Any) -> None:
        self.write("event", step, event=name, reason="", **fields)

    def did(self, kind: str, step: int, seconds: float, waited: float = 0.0) -> None:
        """A step or a validation; one that was done before was done for nothing then."""
        part = "compute" if kind == "train" else kind
        before, waited_before = self.done.get((kind, step), (0.0, 0.0))
        self.truth["replay"] += before + waited_before
        self.truth[part] += seconds - before
        self.truth["data_wait"] += waited - waited_before
        self.done[kind, step] = (seconds, waited)

    def attempt(self, name: str, step: int) -> int:
        """Trains from ``step`` until it is stopped or at its end; returns the newest checkpoint's step."""
        lead_in = "startup" if name in ("start", "resume") else "restart"
        began = self.now
        self.truth["restart"] += self.lost
        self.lost = 0.0
        self.spend(lead_in)
        if name != "start" and self.draw.draw(st.booleans()):
            self.event("damaged", step)  # said by the new workers, and no sign of the old ones' life
        self.event(name, step, seconds=self.now - began)
        saved = step
        if name == "start":
            self.event("checkpoint", 0, blocking_seconds=self.spend("checkpoint"))
        self.spend(lead_in)
        while step < STEPS:
            step += 1
            waited = self.spend()
            seconds = self.spend()
            self.did("train", step, seconds, waited)
            self.write("train", step, step_seconds=seconds + waited, data_seconds=waited)
            if self.draw.draw(st.booleans()):
                seconds = self.spend()
                self.did("validation", step, seconds)
                self.write("validation", step, seconds=seconds)
            if step % 3 == 0:
                copied = self.spend("checkpoint")
                self.spend("idle")  # other things, beside which it is written
                self.event("checkpoint", step, blocking_seconds=copied + self.spend("checkpoint"))
                saved = step
            fate = self.draw.draw(st.sampled_from(["on", "on", "on", "between", "killed", "stopped", "grown"]))
            if step < STEPS and fate == "between":
                self.spend("idle")
                self.event("skipped", step)
            elif step < STEPS and fate == "killed":
                self.lost = self.draw.draw(SECONDS)
                self.now += self.lost
                self.event("stalled", step)  # the driver's word, after the workers' last
                self.next = "restart"
                return saved
            elif step < STEPS and fate in ("stopped", "grown"):
                self.event("interrupted", step)
                self.now += self.draw.draw(SECONDS)  # a night: nobody trains, and nobody wanted to
                self.next = "resume" if fate == "stopped" else "resize"
                return step
        self.event("finished", step)
        return step


def run(data: st.DataObject) -> History:
    history = History(data)
    step = 0
    while step < STEPS:
        step = history.attempt(history.next, step)
    return history


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_part_is_what_the_time_went_to(data: st.DataObject) -> None:
    history = run(data)
    found = goodput(history.lines)
    assert found.parts == pytest.approx(history.truth, abs=1e-5)
    assert sum(found.parts.values()) == pytest.approx(found.wall, rel=0.01, abs=1e-5)
    assert 0 <= found.share <= 1 + 1e-9
    assert found.attempts == sum(line.get("event") in BEGINNINGS for line in history.lines)


def test_a_run_by_hand() -> None:
    """One kill after step 3, with step 2 saved: step 3 is done twice."""
    lines = [
        {"kind": "event", "event": "start", "time": 10.0, "step": 0, "seconds": 10.0},
        *({"kind": "train", "time": 10.0 + 5 * s, "step": s, "step_seconds": 5.0, "data_seconds": 1.0} for s in (1, 2)),
        {"kind": "event", "event": "checkpoint", "time": 22.0, "step": 2, "blocking_seconds": 1.5},
        {"kind": "train", "time": 27.0, "step": 3, "step_seconds": 5.0, "data_seconds": 1.0},
        {"kind": "event", "event": "restart", "time": 37.0, "step": 2, "seconds": 9.0},
        {"kind": "train", "time": 42.0, "step": 3, "step_seconds": 5.0, "data_seconds": 1.0},
        {"kind": "event", "event": "finished", "time": 42.0, "step": 3},
    ]
    found = goodput(lines)
    parts = {"startup": 10, "compute": 12, "data_wait": 3, "checkpoint": 1.5, "idle": 0.5, "replay": 5, "restart": 10}
    assert found.parts == pytest.approx({**dict.fromkeys(PARTS, 0.0), **parts})
    assert found.wall == 42
    assert found.share == pytest.approx(12 / 42)


def test_a_run_that_never_came_to_a_step() -> None:
    lines = [{"kind": "event", "event": "start", "time": 10.0, "step": 0, "seconds": 4.0}]
    assert goodput(lines).parts["startup"] == 4
    lines.append({"kind": "event", "event": "failed", "time": 30.0, "step": 0})
    assert goodput(lines).parts["restart"] == 20
    assert goodput([]).share == 0

"""A trial that trains in turns, and one that goes on from another one's checkpoint with other settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distft.data.order import Order
from distft.data.store import Prepared
from distft.errors import JobError
from distft.orchestrate.search.adopt import adopt
from distft.runs import append_line, event, read_lines
from distft.train import Outcome
from distft.train.folder import begin
from distft.train.outcome import Attempt
from distft.train.worker import work
from distft.world import World
from tests.distributed import tiny

STEPS = 9  # of the first turn, of 20
RATE = r"(?m)checkpoint is of: train\.learning_rate was 0\.001, is 0\.03$"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE", str(home / "cache"))
        return tiny.prepare(home)


def rungs(home: Path, prepared: Path) -> tuple[int, ...]:
    """A rung that step ``STEPS`` is the first to reach."""
    rows = Prepared.open(prepared).rows("train")
    order = Order.of(tiny.job(home), len(rows))
    tokens = np.cumsum([rows.tokens(step) for step in order.first(STEPS)])
    return (int(tokens[-2]) + 1,)


def train(home: Path, prepared: Path, name: str, *settings: str, turn: bool = False) -> Outcome:
    levels, job, run = rungs(home, prepared), tiny.job(home, *settings), tiny.run_of(home, name)
    if not run.job.exists():
        begin(job, run)
    attempt = Attempt(rungs=levels, until=levels[0] if turn else None)
    return work(job, World(), run, prepared, home / "model", resume=True, kind="plain", attempt=attempt)


def test_a_turn_ends_at_its_rung_with_a_checkpoint_and_the_next_goes_on_to_the_same_digits(
    home: Path, prepared: Path
) -> None:
    assert train(home, prepared, "whole").stopped is None
    first = train(home, prepared, "turns", turn=True)
    assert (first.step, first.stopped) == (STEPS, "turn")
    again = train(home, prepared, "turns", turn=True)  # by a driver that has not heard of it
    assert (again.step, again.stopped) == (STEPS, "turn")
    assert len(tiny.curve(home, "turns")) == STEPS
    assert train(home, prepared, "turns").stopped is None
    losses = [[line["loss"] for line in tiny.curve(home, name)] for name in ("whole", "turns")]
    assert losses[0] == losses[1]
    events = [line["event"] for line in read_lines(tiny.run_of(home, "turns").metrics) if "event" in line]
    assert [name for name in events if name in ("start", "resume", "restart", "interrupted", "finished")] == [
        *("start", "interrupted", "resume", "interrupted", "resume", "finished")
    ]


def test_a_trial_goes_on_from_anothers_weights_with_the_settings_that_changed_and_no_others(
    home: Path, prepared: Path
) -> None:
    """The loss of a step is measured before its update: that of the first one is the other trial's."""
    train(home, prepared, "source", turn=True)
    other, source, rate = tiny.run_of(home, "other"), tiny.run_of(home, "source"), "train.learning_rate=3e-2"
    train(home, prepared, "other", rate, turn=True)
    assert adopt(tiny.job(home, rate), source, other)
    with pytest.raises(JobError, match=RATE):
        train(home, prepared, "other", rate)
    exploit = event("exploit", STEPS, "for a test")
    append_line(other.metrics, {**exploit, "before": {"train.learning_rate": 2e-3}})
    with pytest.raises(JobError, match=RATE):
        train(home, prepared, "other", rate)
    append_line(other.metrics, {**exploit, "step": STEPS - 1, "before": {"train.learning_rate": 1e-3}})
    with pytest.raises(JobError, match=RATE):
        train(home, prepared, "other", rate)
    append_line(other.metrics, {**exploit, "before": {"train.learning_rate": 1e-3}})
    with pytest.raises(JobError, match=r"(?m)checkpoint is of: train\.weight_decay was 0\.1, is 0(\.0)?$"):
        train(home, prepared, "other", rate, "train.weight_decay=0")
    assert train(home, prepared, "other", rate).stopped is None
    train(home, prepared, "source")
    mine, theirs = tiny.curve(home, "other"), tiny.curve(home, "source")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == list(range(1, 21))
    assert [line["loss"] for line in mine[: STEPS + 1]] == [line["loss"] for line in theirs[: STEPS + 1]]
    assert mine[STEPS]["learning_rate"] == pytest.approx(30 * theirs[STEPS]["learning_rate"])
    assert mine[STEPS + 1]["loss"] != theirs[STEPS + 1]["loss"]

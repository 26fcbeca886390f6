"""What ``distft chaos`` draws, whom it may touch, and how it reads what came of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.errors import JobError
from distft.orchestrate.proof import faults
from distft.orchestrate.proof.chaos import compare
from distft.orchestrate.proof.disturbance import KINDS, Struck, aftermath, plan
from distft.runs import Run, write_json
from tests.distributed import tiny


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(13, 400), st.integers(1, 30))
def test_faults_are_drawn_from_the_seed(seed: int, kills: int, steps: int, every: int) -> None:
    drawn = plan(seed, kills, steps, KINDS, every)
    assert drawn == plan(seed, kills, steps, KINDS, every)
    at = [fault.step for fault in drawn]
    assert at == sorted(set(at))
    assert all(1 <= step < steps for step in at)
    assert len(drawn) == kills
    assert all(fault.step + 2 * every <= steps for fault in drawn if fault.kind == "disk")


def test_each_kind_comes_once_before_one_comes_again() -> None:
    for seed in range(20):
        kinds = [fault.kind for fault in plan(seed, 8, 1000, ["worker", "driver", "node", "flip"], 1)]
        assert sorted(kinds[:4]) == sorted(kinds[4:]) == ["driver", "flip", "node", "worker"]
    assert len({tuple(fault.kind for fault in plan(seed, 4, 1000, KINDS, 1)) for seed in range(20)}) > 5


def test_more_faults_than_steps_are_refused() -> None:
    with pytest.raises(JobError, match="20 faults do not fit into 20 steps"):
        plan(1, 20, 20, KINDS, 1)


def train(step: int, at: float, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": at, **more}


def event(name: str, step: int, at: float) -> dict[str, Any]:
    return {"kind": "event", "event": name, "step": step, "time": at}


def test_what_a_kill_cost() -> None:
    """Killed after step 5 while a step was about to end; back at the checkpoint of step 4."""
    lines = [event("start", 0, 0.0), *(train(step, float(step)) for step in range(1, 7))]
    lines += [event("lost", 6, 7.0), event("restart", 4, 9.0), train(5, 10.5), train(6, 11.5)]
    struck = aftermath(Struck("worker", 5, 5.5, "rank 0 killed"), lines)
    assert (struck.steps_lost, struck.seconds) == (2, 5.0)


def test_a_kill_that_nothing_came_after() -> None:
    lines = [event("start", 0, 0.0), train(1, 1.0)]
    assert aftermath(Struck("driver", 1, 1.5, ""), lines).seconds is None
    lines.append(event("restart", 0, 3.0))
    assert aftermath(Struck("driver", 1, 1.5, ""), lines) == Struck("driver", 1, 1.5, "", steps_lost=1, seconds=None)


def test_a_full_disk_is_over_when_a_checkpoint_is_written() -> None:
    lines = [event("start", 0, 0.0), event("checkpoint", 2, 2.0), train(3, 3.0), event("checkpoint_failed", 4, 4.0)]
    assert aftermath(Struck("disk", 2, 2.5, ""), lines).seconds is None
    assert aftermath(Struck("disk", 2, 2.5, ""), [*lines, event("checkpoint", 6, 6.0)]).seconds == 3.5


def test_losses_beside_those_of_an_undisturbed_run() -> None:
    curve = [train(step, 0.0, loss=2.0, grad_norm=1.0, world_size=2) for step in (1, 2)]
    assert compare(curve, curve, 1e-5) == compare(curve, curve, 1.0)
    assert (compare(curve, curve, 1e-5).difference, compare(curve, curve, 1e-5).bound) == (0.0, 0.0)
    other = [curve[0], {**curve[1], "grad_norm": 1.0 + 1e-7}]
    assert compare(curve, other, 1e-5).difference == pytest.approx(1e-7)
    assert compare(curve, other, 1e-5).bound == 0.0
    assert compare(curve, [curve[0], {**curve[1], "world_size": 1}], 1e-5).bound == 1e-5
    assert compare(curve, curve[:1], 1e-5).difference == float("inf")
    assert compare(curve, [curve[0], {**curve[1], "loss": None}], 1e-5).difference == float("inf")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "runs" / "chaos")
    made.logs.mkdir(parents=True)
    return made


@pytest.fixture
def sleeper(run: Run) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to the log of rank 0."""
    with (run.logs / "rank-0.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=log)
    yield process
    process.kill()
    process.wait()


def place(run: Run, rank: int, pid: int, attempt: float) -> None:
    facts = {"rank": rank, "attempt": attempt, "pid": pid, "started": 0, "node": "", "host": ""}
    write_json(run.logs / f"rank-{rank}.json", facts)


def test_only_a_process_that_writes_the_runs_log_is_its_worker(run: Run, sleeper: subprocess.Popen[bytes]) -> None:
    assert faults.worker_of(run, 0.5) is None
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    try:
        place(run, 0, bystander.pid, 1.0)  # a number that was a worker's, and is another process's by now
        assert faults.worker_of(run, 0.5) is None
        place(run, 1, sleeper.pid, 1.0)  # another rank's log
        assert faults.worker_of(run, 0.5) is None
        place(run, 0, sleeper.pid, 1.0)
        worker = faults.worker_of(run, 0.9)
        assert worker is not None
        assert worker.pid == sleeper.pid
        assert faults.kill(worker) == f"rank 0 killed (pid {sleeper.pid})"
        assert sleeper.wait(10) == -9
        assert bystander.poll() is None
        assert faults.worker_of(run, 0.9) is None
    finally:
        bystander.kill()
        bystander.wait()


def test_workers_of_an_earlier_group_are_left_alone(run: Run, sleeper: subprocess.Popen[bytes]) -> None:
    place(run, 0, sleeper.pid, 1.0)
    place(run, 1, 1, 2.0)
    assert faults.worker_of(run, 0.0) is None


def checkpoint(folder: Path) -> None:
    (folder / "w2-abc").mkdir(parents=True)
    (folder / "w2-abc" / "rank-00000.safetensors").write_bytes(bytes(range(256)))
    (folder / "COMPLETE").write_bytes(b"{}" * 50)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_one_bit_of_the_newest_checkpoint_is_changed(first: float, second: float, third: float) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job, run = tiny.job(folder), Run(folder / "runs" / "chaos")
        checkpoint(run.checkpoints / "step-000010")
        assert faults.flip_byte(job, run, (first, second, third)) is None  # there would be none to go back to
        checkpoint(run.checkpoints / "step-000020")
        (run.checkpoints / "step-000030").mkdir()  # without COMPLETE it is none
        before = {path: path.read_bytes() for path in run.checkpoints.rglob("*") if path.is_file()}
        what = faults.flip_byte(job, run, (first, second, third))
        assert what is not None
        assert "step-000020/" in what
        changed = [path for path in before if path.read_bytes() != before[path]]
        assert len(changed) == 1
        assert changed[0].is_relative_to(run.checkpoints / "step-000020")
        pairs = zip(changed[0].read_bytes(), before[changed[0]], strict=True)
        assert sum((ours ^ theirs).bit_count() for ours, theirs in pairs) == 1


def test_a_disk_that_others_need_is_not_filled(tmp_path: Path, run: Run) -> None:
    assert "file system of their own" in str(faults.why_not_fill(tiny.job(tmp_path), run))
    bucket = tiny.job(tmp_path, "checkpoint.storage=s3://bucket/place")
    assert faults.why_not_fill(bucket, run) == "the checkpoints lie in a bucket"
    shared = Path("/dev/shm")
    if shared.exists() and shared.stat().st_dev != tmp_path.stat().st_dev:
        large = tiny.job(tmp_path, f"checkpoint.storage={shared}")
        assert (faults.why_not_fill(large, run) is None) == (shutil.disk_usage(shared).total <= 8 << 30)

"""Experiment trackers: told everything, never waited for, and real ones where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distft.config import Job
from distft.errors import JobError
from distft.runs import Run, read_json, read_lines
from distft.train import trackers
from distft.train.reporter import FileReporter
from distft.train.trackers import Follower, followers, measurements, refuse_absent, settings
from tests.support import free_port
from tests.unit.tiny_runs import job_of, training_lines

LINES = training_lines(12, kill=7)


class Notebook:
    """A tracker that keeps what it hears."""

    def __init__(self, *, fails_at: int | None = None, hold: threading.Event | None = None) -> None:
        self.heard: list[dict[str, Any]] = []
        self.closed: list[bool] = []
        self._fails_at, self._hold = fails_at, hold

    def tell(self, records: Sequence[dict[str, Any]]) -> None:
        if self._hold:
            self._hold.wait()
        self.heard += records
        if self._fails_at is not None and len(self.heard) > self._fails_at:
            raise ConnectionError("the server\nhas gone")

    def close(self, *, ended_well: bool) -> None:
        self.closed.append(ended_well)


def report(run: Run, following: Sequence[Follower], lines: Sequence[dict[str, Any]] = LINES) -> float:
    """What training does with its lines; the longest that one took, in seconds."""
    longest = 0.0
    with FileReporter(run, is_main=True, trackers=following) as reporter:
        for line in lines:
            began = time.perf_counter()
            {"train": reporter.train, "validation": reporter.validation, "event": reporter.event}[line["kind"]](line)
            longest = max(longest, time.perf_counter() - began)
    return longest


def complaints(run: Run) -> list[str]:
    return [line["reason"] for line in read_lines(run.metrics) if line.get("event") == "tracker"]


def test_a_tracker_hears_every_step_and_validation_in_order(tmp_path: Path) -> None:
    run, notes = Run(tmp_path), Notebook()
    report(run, [Follower("a notebook", lambda: notes)])
    assert notes.heard == [line for line in LINES if line["kind"] != "event"]
    assert notes.closed == [True]
    assert list(read_lines(run.metrics)) == LINES


def test_a_tracker_is_told_that_training_failed(tmp_path: Path) -> None:
    notes = Notebook()
    with (
        pytest.raises(ZeroDivisionError),
        FileReporter(Run(tmp_path), is_main=True, trackers=[Follower("a notebook", lambda: notes)]),
    ):
        raise ZeroDivisionError
    assert notes.closed == [False]


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    run, notes, others = Run(tmp_path), Notebook(fails_at=0), Notebook()
    first = Follower("a notebook", lambda: notes)
    first.tell(LINES[1])
    first._thread.join(5)
    report(run, [first, Follower("another", lambda: others)])
    assert complaints(run) == ["a notebook failed: the server has gone; training goes on without it"]
    assert [line for line in read_lines(run.metrics) if line.get("event") != "tracker"] == LINES
    assert len(others.heard) == sum(line["kind"] != "event" for line in LINES)


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "QUEUED", 5)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.5)
    run, hold = Run(tmp_path), threading.Event()
    began = time.monotonic()
    longest = report(run, [Follower("a notebook", lambda: Notebook(hold=hold))])
    assert longest < 0.25
    assert time.monotonic() - began < 5
    assert complaints(run) == ["a notebook is too slow: 5 records wait; training goes on without it"]
    hold.set()


def test_one_that_does_not_end_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.3)
    run, hold = Run(tmp_path), threading.Event()
    report(run, [Follower("a notebook", lambda: Notebook(hold=hold))])
    assert complaints(run) == ["a notebook did not take everything within 0 s of the end; training goes on without it"]
    hold.set()


def test_measurements_are_the_numbers_of_a_line() -> None:
    found = measurements({"kind": "train", "time": 1.0, "step": 3, "steps": 9, "loss": None, "mfu": 0.5, "rows": 8})
    assert found == {"train/mfu": 0.5, "train/rows": 8.0}


def test_settings_tell_no_tracker_of_addresses(tmp_path: Path) -> None:
    job = job_of("language_modeling", tmp_path, track={"mlflow": "http://user:secret@host:5000"})
    told = settings(job)
    assert told["train.learning_rate"] == "2e-05"
    assert "secret" not in str(told)


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("language_modeling", tmp_path, track={"wandb": "project"})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"track\.wandb: wandb is not installed here") as refused:
        refuse_absent(job)
    assert "pip install 'distft[wandb]'" in str(refused.value)
    refuse_absent(job_of("language_modeling", tmp_path))


def tracked(tmp_path: Path, **track: Any) -> tuple[Job, Run]:
    return job_of("language_modeling", tmp_path, track={"tensorboard": False, **track}), Run(tmp_path / "runs" / "sea")


def losses_of(run: Run) -> list[tuple[int, float]]:
    """Training losses by step in TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (run.folder / "tensorboard").iterdir()
    content, place, found = file.read_bytes(), 0, []
    while place < len(content):  # TFRecord: length, its check, the event, its check
        length = int.from_bytes(content[place : place + 8], "little")
        told = Event.FromString(content[place + 12 : place + 12 + length])
        found += [(told.step, one.simple_value) for one in told.summary.value if one.tag == "train/loss"]
        place += length + 16
    return found


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    job, run = tracked(tmp_path, tensorboard=True)
    report(run, followers(job, run))
    told = [(line["step"], pytest.approx(line["loss"])) for line in LINES if line["kind"] == "train"]
    assert losses_of(run) == told


def test_mlflow_keeps_steps_settings_and_the_end(tmp_path: Path) -> None:
    client = pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    job, run = tracked(tmp_path, mlflow="mlflow.db")
    report(run, followers(job, run))
    assert complaints(run) == []
    store = client.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    name = read_json(run.folder / "tracking.json")["mlflow"]
    kept = store.get_run(name)
    assert (kept.info.run_name, kept.info.status) == ("sea", "FINISHED")
    assert kept.data.params["train.batch_size"] == "32"
    told = sorted((line["step"], line["loss"]) for line in LINES if line["kind"] == "train")
    assert sorted((one.step, one.value) for one in store.get_metric_history(name, "train/loss")) == told
    report(run, followers(job, run), LINES[:2])  # a restart goes on with the same run
    assert read_json(run.folder / "tracking.json")["mlflow"] == name
    assert len(store.search_runs([kept.info.experiment_id])) == 1


def test_mlflow_that_is_not_there_costs_training_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    job, run = tracked(tmp_path, mlflow=f"http://127.0.0.1:{free_port()}")
    assert report(run, followers(job, run)) < 1.0
    (told,) = complaints(run)
    assert told.startswith("MLflow failed: ")
    assert told.endswith("; training goes on without it")


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a file of W&B's: LevelDB's log format (blocks of 32 KiB) after a head of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    job, run = tracked(tmp_path, wandb="waves")
    report(run, followers(job, run))
    assert complaints(run) == []
    (file,) = (run.folder / "wandb").glob("offline-run-*/*.wandb")
    losses: list[tuple[int, float]] = []
    projects = set()
    kinds: Counter[str | None] = Counter()
    for content in records_of(file.read_bytes()):
        record = Record.FromString(content)
        items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        if "train/loss" in items:
            losses.append((int(items["step"]), float(items["train/loss"])))
        kinds[record.WhichOneof("record_type")] += 1
        if record.WhichOneof("record_type") == "run":
            projects.add((record.run.project, record.run.display_name, record.run.run_id))
    log = (file.parent / "logs" / "debug-internal.log").read_text()  # once, on a busy machine, there were no losses
    expected = [(line["step"], line["loss"]) for line in LINES if line["kind"] == "train"]
    assert losses == expected, f"{file.stat().st_size} bytes with {kinds}\n{log}"
    assert projects == {("waves", "sea", read_json(run.folder / "tracking.json")["wandb"])}


UNREACHABLE = """
import sys, time
from pathlib import Path
from distft.train import trackers
from tests.unit.test_trackers import complaints, followers, report, tracked

trackers.CLOSING_SECONDS, trackers.WANDB_SECONDS = 3.0, 4.0
job, run = tracked(Path(sys.argv[1]), wandb="waves")
assert report(run, followers(job, run)) < 1.0
print(*complaints(run), sep="\\n")
"""


def test_wandb_that_is_not_there_costs_training_nothing(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    address = f"http://127.0.0.1:{free_port()}"
    reached = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": 40 * "0"}
    command = [sys.executable, "-c", UNREACHABLE, str(tmp_path)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **reached},
        cwd=Path(__file__).parents[2],
        timeout=60,  # its exit too waits for nobody
    )
    told = "Weights & Biases did not take everything within 3 s of the end; training goes on without it"
    assert ended.stdout.splitlines() == [told], ended.stderr


@pytest.mark.usefixtures("module_cache")
def test_a_training_run_tells_its_trackers_and_each_ranks_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tracker that works and one that nobody answers, beside a real training."""
    from distft.task.prepare import prepare
    from distft.train.worker import work
    from distft.world import World
    from tests.distributed import tiny

    tiny.make(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    job = tiny.job(tmp_path, "track.tensorboard=true", f"track.mlflow=http://127.0.0.1:{free_port()}")
    run = tiny.run_of(tmp_path, "tracked")
    work(job, World(), run, prepare(job, tmp_path / "model"), tmp_path / "model", kind="plain")
    lines = list(read_lines(run.metrics))
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 20
    assert all(line["rank_peak_memory_bytes"] == [line["peak_memory_bytes"]] for line in steps)
    (told,) = complaints(run)
    assert told.startswith("MLflow failed: ")
    assert [step for step, _ in losses_of(run)] == list(range(1, 21))

"""Checkpoints: whole or not there, verified, signed, and within their budget; in a folder and in a bucket."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from distft.checkpoint import (
    Checkpoint,
    Folder,
    Saver,
    State,
    Storage,
    best,
    check_budget,
    complete,
    newest_sound,
    obsolete,
    shared_key,
    signing_key,
    storage_of,
    verify,
    weights,
    withdraw_after,
)
from distft.checkpoint.storage import Bucket, FileRecord
from distft.config import Job
from distft.engine import KINDS, Piece, Snapshot
from distft.errors import CapacityError, CheckpointError
from distft.runs import Run
from distft.world import World

KEY = b"0" * 32
STATE = State(0, 1, 0, "fp32", "0123", settings={"train.batch_size": 8})
ELEMENTS = 100


class OneTensor:
    """As much of an engine as saving needs, in one process: its state is one vector."""

    world = World()

    def __init__(self, elements: int = ELEMENTS) -> None:
        self.weight = torch.arange(elements, dtype=torch.float32)

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        return Snapshot((Piece(kind, "w", (len(self.weight),), 0, self.weight) for kind in KINDS), 1, into)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def gather_aside(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def saver(storage: Storage, budget: int = 10**9, key: bytes = KEY, elements: int = ELEMENTS) -> Saver:
    return Saver(OneTensor(elements), storage, key, budget)  # type: ignore[arg-type]


def write(storage: Storage, step: int, best_step: int | None = None, **how: Any) -> Checkpoint:
    return saver(storage, **how).save(replace(STATE, step=step, best_step=best_step))


def steps(storage: Storage) -> list[int]:
    return [checkpoint.step for checkpoint in complete(storage, KEY)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "checkpoints")


def shard(folder: Folder, checkpoint: Checkpoint) -> Path:
    return folder.root / checkpoint.name / checkpoint.files[0].name


def test_what_is_written_is_read_back(folder: Folder) -> None:
    written = write(folder, 100, best_step=100)
    (read,) = complete(folder, KEY)
    assert read == written
    assert sorted(folder.sizes()) == sorted(read.names)
    assert sum(folder.sizes().values()) == read.bytes
    verify(read)
    with read.shards() as files:
        assert torch.equal(weights(files)["w"], torch.arange(ELEMENTS, dtype=torch.float32))


def test_a_save_is_of_the_moment_it_began_however_slow_the_storage(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, may_write = OneTensor(), threading.Event()
    saving = Saver(engine, folder, KEY, 10**9)  # type: ignore[arg-type]
    write = Folder.write

    def late(self: Folder, name: str, content: Any) -> Any:
        may_write.wait()
        return write(self, name, content)

    monkeypatch.setattr(Folder, "write", late)
    assert not saving.pending
    saving.begin(replace(STATE, step=1))
    assert saving.pending  # passes go on
    saving.hold()
    engine.weight += 1  # an update
    may_write.set()
    with saving.finish().shards() as files:
        assert torch.equal(weights(files)["w"], torch.arange(ELEMENTS, dtype=torch.float32))
    assert not saving.pending


def test_newest_comes_first_also_past_six_digits(folder: Folder) -> None:
    for step in (20, 1_000_000, 3):
        write(folder, step)
    assert steps(folder) == [1_000_000, 20, 3]


def test_a_step_that_is_done_again_takes_the_place_of_the_first(folder: Folder) -> None:
    first, second = write(folder, 5), write(folder, 5)
    assert complete(folder, KEY) == [second]
    write(folder, 6)
    assert shard(folder, second).exists()
    assert not shard(folder, first).exists()


def test_invariant_7_without_complete_it_does_not_exist(folder: Folder) -> None:
    write(folder, 1)
    write(folder, 2)
    (folder.root / "step-000002" / "COMPLETE").unlink()
    assert steps(folder) == [1]
    found, (problem,) = newest_sound(folder, KEY)
    assert found is not None
    assert found.step == 1
    assert "step-000002: it has no COMPLETE" in problem
    write(folder, 3)
    assert not (folder.root / "step-000002").exists()  # what a kill left behind takes no room for ever


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def forge(path: Path) -> None:
    """Another loss, signed with a key that is not the run's."""
    document = json.loads(path.read_text())
    path.write_bytes(
        Checkpoint(
            Folder(path.parents[1]),
            replace(STATE, step=2, probe_loss=1.0),
            tuple(FileRecord(**file) for file in document["files"]),
        ).content(b"1" * 32)
    )


def age(path: Path) -> None:
    """As an older version wrote it."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}, indent=2))


SPOILT: list[tuple[Callable[[Path, Path], object], str]] = [
    (lambda shard, _: flip(shard), "another sha256"),
    (lambda shard, _: shard.write_bytes(shard.read_bytes()[:-1]), "bytes instead of"),
    (lambda shard, _: shard.unlink(), "is missing"),
    (lambda _, marker: marker.write_text('{"format": 2'), "COMPLETE cannot be read"),
    (lambda _, marker: age(marker), "format 1, and this version reads 3"),
    (lambda _, marker: marker.write_text(marker.read_text().replace('"fp32"', '"bf16"')), "its signature is wrong"),
    (lambda _, marker: forge(marker), "its signature is wrong"),
    (lambda _, marker: marker.write_bytes((marker.parents[1] / "step-000001/COMPLETE").read_bytes()), "a copy of"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT)
def test_invariant_7_a_damaged_one_is_named_and_passed_over(
    folder: Folder, spoil: Callable[[Path, Path], object], said: str
) -> None:
    write(folder, 1)
    newest = write(folder, 2)
    spoil(shard(folder, newest), folder.root / newest.name / "COMPLETE")
    found, (problem,) = newest_sound(folder, KEY)
    assert found is not None
    assert found.step == 1
    assert "step-000002" in problem
    assert said in problem


def test_invariant_7_any_flipped_bit_is_seen(folder: Folder) -> None:
    checkpoint = write(folder, 1)
    for path in (shard(folder, checkpoint), folder.root / checkpoint.name / "COMPLETE"):
        whole = path.read_bytes()
        for place in range(40):
            flip(path, place / 40)
            assert newest_sound(folder, KEY)[0] is None
            path.write_bytes(whole)
    assert newest_sound(folder, KEY)[0] == checkpoint


def test_a_checkpoint_of_another_run_is_none(folder: Folder) -> None:
    write(folder, 1, key=b"2" * 32)
    found, (problem,) = newest_sound(folder, KEY)
    assert found is None
    assert "not of this run" in problem


def test_invariant_7_a_damaged_one_does_not_stand_for_the_newest(folder: Folder) -> None:
    size = write(folder, 1).bytes
    flip(shard(folder, write(folder, 5)))
    found, _ = newest_sound(folder, KEY)
    assert found is not None
    withdraw_after(folder, found.step)
    assert steps(folder) == [1]
    write(folder, 2, budget=2 * size)
    assert steps(folder) == [2, 1]
    assert not (folder.root / "step-000005").exists()


def test_invariant_7_newest_and_best_stay_within_the_budget(folder: Folder) -> None:
    budget = 3 * write(folder, 1, best_step=1).bytes + 100  # digits of steps
    for step, best_step in enumerate([1, 3, 3, 3, 3], start=2):
        write(folder, step, best_step, budget=budget)
        assert {step, best_step} <= set(steps(folder))
        assert sum(folder.sizes().values()) <= budget
    assert steps(folder) == [6, 5, 3]
    found = best(folder, KEY)
    assert found is not None
    assert found.step == 3


def test_what_lies_beside_the_checkpoints_counts_and_stays(folder: Folder) -> None:
    size = write(folder, 1).bytes
    (folder.root / "notes.txt").write_bytes(b"!" * size)
    with pytest.raises(CapacityError, match=r"checkpoint\.budget"):
        write(folder, 2, budget=2 * size + 100)
    write(folder, 2, budget=3 * size + 100)
    assert (folder.root / "notes.txt").exists()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    incoming=st.integers(1, 10_000),
    budget=st.integers(1, 20_000),
    data=st.data(),
)
def test_invariant_7_whatever_goes_it_is_never_the_newest_or_the_best(
    sizes: list[int], incoming: int, budget: int, data: st.DataObject
) -> None:
    best_step = data.draw(st.integers(1, len(sizes)))
    checkpoints = [
        Checkpoint(Folder(Path()), replace(STATE, step=step, best_step=best_step), (FileRecord("a", size, ""),))
        for step, size in enumerate(sizes, start=1)
    ][::-1]
    kept_at_least = {checkpoints[0].step, best_step}
    least = incoming + sum(checkpoint.bytes for checkpoint in checkpoints if checkpoint.step in kept_at_least)
    if least > budget:
        with pytest.raises(CapacityError, match=r"checkpoint\.budget"):
            obsolete(checkpoints, budget, incoming)
        return
    going = obsolete(checkpoints, budget, incoming)
    assert kept_at_least.isdisjoint(checkpoint.step for checkpoint in going)
    staying = [checkpoint for checkpoint in checkpoints if checkpoint not in going]
    assert incoming + sum(checkpoint.bytes for checkpoint in staying) <= budget
    assert [checkpoint.step for checkpoint in going] == sorted(checkpoint.step for checkpoint in going)


def test_a_budget_that_cannot_do_is_refused_before_training() -> None:
    check_budget(3000, 1000, validated=True)
    check_budget(2000, 1000, validated=False)
    with pytest.raises(CapacityError, match=r"at least 3\.0 kB"):
        check_budget(2999, 1000, validated=True)


def test_a_checkpoint_that_does_not_fit_the_budget_leaves_nothing(folder: Folder) -> None:
    size = write(folder, 1).bytes
    saving = saver(folder, budget=2 * size, elements=2 * ELEMENTS)
    with pytest.raises(CapacityError, match=r"checkpoint\.budget"):
        saving.begin(replace(STATE, step=2))
    assert not saving.pending
    assert steps(folder) == [1]
    assert not (folder.root / "step-000002").exists()


def test_a_save_is_complete_before_anybody_waits_for_it(folder: Folder) -> None:
    saving = saver(folder)
    saving.begin(replace(STATE, step=7))
    until = time.monotonic() + 10
    while not saving.written and time.monotonic() < until:
        time.sleep(0.01)
    assert steps(folder) == [7]
    assert saving.finish().step == 7
    assert 0 < saving.seconds < 10


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    storage = Folder(run.checkpoints)
    key = shared_key(OneTensor(), run, storage)  # type: ignore[arg-type]
    assert len(key) == 32
    assert signing_key(run, storage) == key
    assert run.key.stat().st_mode & 0o777 == 0o600
    assert run.checkpoints not in run.key.parents
    write(storage, 1, key=key)
    run.key.unlink()
    with pytest.raises(CheckpointError, match="the key that signed them is gone"):
        signing_key(run, storage)


def test_a_run_keeps_its_checkpoints_where_the_job_says(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "name")

    def place(storage: str | None) -> str:
        values = {"model": {"source": "m"}, "task": {"kind": "language_modeling"}, "data": {"source": "d.txt"}}
        return str(storage_of(Job.from_values({**values, "checkpoint": {"storage": storage}}, tmp_path), run))

    assert place(None) == str(run.checkpoints)
    assert place("shared") == str(tmp_path / "shared" / "name")
    assert place("s3://bucket/deep/") == "s3://bucket/deep/name"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name in ("AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "DISTFT_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="states")
    yield Bucket("s3://states/runs/name")
    server.stop()


def test_a_bucket_holds_checkpoints_as_a_folder_does(bucket: Bucket, tmp_path: Path) -> None:
    size = write(bucket, 1).bytes
    for step in (2, 3):
        newest = write(bucket, step, budget=2 * size + 100)
    assert steps(bucket) == [3, 2]
    assert sum(bucket.sizes().values()) <= 2 * size + 100
    with newest.shards() as files:
        assert torch.equal(weights(files)["w"], torch.arange(ELEMENTS, dtype=torch.float32))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]
    name = f"{newest.name}/{newest.files[0].name}"
    spoilt = bytearray(bucket.read(name))
    spoilt[-1] ^= 1
    bucket.put(name, bytes(spoilt))
    found, (problem,) = newest_sound(bucket, KEY)
    assert found is not None
    assert found.step == 2
    assert "s3://states/runs/name/step-000003" in problem
    assert "another sha256" in problem
    withdraw_after(bucket, 2)
    bucket.put("step-000009/w1-0/rank-00000.safetensors", b"left by a killed save")
    write(bucket, 3)
    assert sorted(bucket.sizes()) == sorted(name for one in complete(bucket, KEY) for name in one.names)


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_said_on_saving() -> None:
    with pytest.raises(CheckpointError, match="there is no bucket 'nowhere'"):
        write(Bucket("s3://nowhere/run"), 1)

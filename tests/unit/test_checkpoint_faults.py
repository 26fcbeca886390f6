"""Checkpoints when a process is killed while it saves, when the disk fills, and while somebody counts their bytes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from distft.checkpoint import Checkpoint, Folder, Saver, Shards, State, complete, newest_sound
from distft.engine import Settings
from distft.engine.plain import PlainEngine
from distft.errors import CapacityError
from distft.model import LossModel
from tests.unit.tiny_models import CONFIGS

#: Importing torch and transformers takes seconds: once for all processes that are killed.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])
KEY = b"0" * 32
STATE = State(0, 1, 0, "fp32", "0123")
FOREVER = 10**12


def engine() -> PlainEngine:
    torch.manual_seed(0)
    return PlainEngine(LossModel(LlamaForCausalLM(CONFIGS["llama"]())), Settings())


def save_forever(folder: Path, budget_bytes: int, said: Connection) -> None:
    """Saves step after step, and says so; every weight is the step."""
    saver = Saver(made := engine(), Folder(folder), KEY, budget_bytes)
    sound, _ = newest_sound(Folder(folder), KEY)
    step = 0 if sound is None else sound.step
    while True:
        step += 1
        fill(made, step)
        saver.begin(replace(STATE, step=step))
        saver.hold()
        fill(made, -1)  # an update: what is written is as it was
        said.send(saver.finish().step)


@torch.no_grad()
def fill(made: PlainEngine, number: float) -> None:
    for master in made._masters:
        master.fill_(number)


def holds(checkpoint: Checkpoint, number: float) -> bool:
    """Whether every weight in it is that number."""
    with checkpoint.shards() as files:
        shards = Shards(files)
        return all(
            bool((shards.read(name, "weight", 0, torch.Size(shape).numel()) == number).all())
            for name, shape in shards.shapes.items()
        )


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of one checkpoint."""
    return Saver(engine(), Folder(tmp_path_factory.mktemp("one")), KEY, FOREVER).save(STATE).bytes


def test_invariant_7_whenever_a_save_is_killed_the_newest_is_whole(tmp_path: Path, size: int) -> None:
    """SIGKILL at random moments; every time it loses at most the save that was under way, and takes no room after."""
    folder, draw, budget = Folder(tmp_path / "checkpoints"), random.Random(), 3 * size + 200
    reached = 0
    for _ in range(3):
        ours, theirs = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=save_forever, args=(folder.root, budget, theirs))
        process.start()
        theirs.close()
        said = [ours.recv()]
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                said.append(ours.recv())
        assert process.exitcode == -signal.SIGKILL
        assert said[0] == reached + 1  # it went on from there
        sound, problems = newest_sound(folder, KEY)
        assert sound is not None
        assert sound.step in {said[-1], said[-1] + 1}  # committed, and killed before it could say so
        assert holds(sound, sound.step)
        assert all("it has no COMPLETE" in problem for problem in problems)
        assert sum(folder.sizes().values()) <= budget
        reached = sound.step
    Saver(engine(), folder, KEY, budget).save(replace(STATE, step=reached + 1))
    kept = {name for checkpoint in complete(folder, KEY) for name in checkpoint.names}
    assert set(folder.sizes()) == kept


@contextlib.contextmanager
def disk_of(folder: Path, size: int) -> Iterator[Path]:
    """A small disk of its own; the test is skipped where nothing may be mounted."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(options, capture_output=True, check=False).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        pytest.skip("nothing may be mounted here")


def test_a_disk_that_is_too_small_is_said_with_its_figures(tmp_path: Path, size: int) -> None:
    with disk_of(tmp_path / "disk", size) as disk:
        folder = Folder(disk / "checkpoints")
        (disk / "other").write_bytes(b"!" * (size // 2))
        saver = Saver(engine(), folder, KEY, FOREVER)
        with pytest.raises(CapacityError, match=r"the disk has \d+.* free, and a checkpoint takes \d+"):
            saver.begin(STATE)
        assert not saver.pending
        assert folder.sizes() == {}


def test_a_disk_that_fills_while_saving_keeps_the_newest_and_the_best(tmp_path: Path, size: int) -> None:
    """Somebody else takes the room meanwhile; the next save finds what pruning has left."""
    with disk_of(tmp_path / "disk", 6 * size) as disk:
        folder = Folder(disk)
        saver = Saver(made := engine(), folder, KEY, FOREVER)
        for step in (1, 2, 3):
            saver.save(replace(STATE, step=step, best_step=1))
        write = Folder.write

        def meanwhile(self: Folder, name: str, content: Iterator[memoryview]) -> tuple[int, str]:
            with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as other:
                while True:
                    other.write(b"!" * 4096)
            return write(self, name, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Folder, "write", meanwhile)
            saver.begin(replace(STATE, step=4))
            with pytest.raises(CapacityError, match="disk is full"):
                saver.finish()
        assert not saver.pending
        assert [checkpoint.step for checkpoint in complete(folder, KEY)] == [3, 1]
        assert not [name for name in folder.sizes() if name.startswith("step-000004")]
        fill(made, 5)
        assert holds(saver.save(replace(STATE, step=5, best_step=1)), 5)


def test_a_file_that_is_cut_short_leaves_nothing(tmp_path: Path, size: int) -> None:
    folder = Folder(tmp_path / "checkpoints")
    saver = Saver(engine(), folder, KEY, FOREVER)
    saver.save(replace(STATE, step=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(CapacityError, match="rank 0"):
            saver.save(replace(STATE, step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not saver.pending
    assert {name.split("/")[0] for name in folder.sizes()} == {"step-000001"}


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    saver = Saver(engine(), Folder(tmp_path / "checkpoints"), KEY, FOREVER)
    with pytest.raises(Exception, match="checkpoints") as error:
        saver.save(STATE)
    assert type(error.value).__name__ == "CheckpointError"
    assert not saver.pending


def test_invariant_7_the_budget_holds_at_every_moment(tmp_path: Path, size: int) -> None:
    folder, budget = Folder(tmp_path / "checkpoints"), 3 * size + 200
    saver, most, stop = Saver(engine(), folder, KEY, budget), [0, 0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[:] = max(most[0], sum(folder.sizes().values())), most[1] + 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for step in range(1, 41):
            saver.save(replace(STATE, step=step, best_step=step // 10 * 10 or 1))
    finally:
        stop.set()
        watcher.join()
    assert most[1] > 100
    assert 2 * size < most[0] <= budget
    assert [checkpoint.step for checkpoint in complete(folder, KEY)] == [40, 39, 30]

"""Checkpoints on disk: whole or not there, verified, and within their budget."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint import (
    Checkpoint,
    State,
    best,
    check_budget,
    complete,
    newest_sound,
    obsolete,
    save,
    verify,
    withdraw_after,
)
from distft.checkpoint.layout import FileRecord
from distft.errors import CapacityError, CheckpointError
from distft.world import World

STATE = State(0, 1, 0, "fp32", "0123", {"train.batch_size": 8})


class FileEngine:
    """As much of an engine as saving needs, in one process: its state is a file of so many bytes."""

    world = World()

    def __init__(self, size: int = 1000, fail: OSError | None = None) -> None:
        self.size = size
        self.fail = fail

    def save(self, folder: Path) -> list[Path]:
        (folder / "zero").mkdir()
        path = folder / "zero" / "shard.pt"
        path.write_bytes(os.urandom(self.size // (2 if self.fail else 1)))
        if self.fail is not None:
            raise self.fail
        return [path]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def state_bytes(self) -> int:
        return self.size


def write(root: Path, step: int, best_step: int | None = None, budget: int = 10**9, **engine: Any) -> Checkpoint:
    return save(FileEngine(**engine), root, replace(STATE, step=step, best_step=best_step), budget)  # type: ignore[arg-type]


def steps(root: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete(root)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path, 100, best_step=100)
    assert (tmp_path / "step-000100" / "COMPLETE").is_file()
    (read,) = complete(tmp_path)
    assert read == written
    assert read.bytes == 1000
    assert [record.name for record in read.files] == ["zero/shard.pt"]
    verify(read)


def test_newest_comes_first_also_past_six_digits(tmp_path: Path) -> None:
    for step in (20, 1_000_000, 3):
        write(tmp_path, step)
    assert steps(tmp_path) == [1_000_000, 20, 3]


def test_invariant_7_without_complete_it_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-000002" / "COMPLETE").unlink()
    assert steps(tmp_path) == [1]
    write(tmp_path, 3)
    assert not (tmp_path / "step-000002").exists()  # what a kill left behind takes no room for ever


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: flip(path), "sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "999 bytes instead of 1,000"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.parents[1] / "COMPLETE").write_text('{"format": 1'), "COMPLETE cannot be read"),
        (lambda path: (path.parents[1] / "COMPLETE").write_text('{"format": 99}'), "format 99"),
    ],
)
def test_invariant_7_a_damaged_one_is_named_and_passed_over(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    spoil(newest.folder / "zero" / "shard.pt")
    sound, (problem,) = newest_sound(tmp_path)
    assert sound is not None
    assert sound.step == 1
    assert "step-000002" in problem
    assert said in problem


def test_invariant_7_a_damaged_one_does_not_stand_for_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 1, budget=2000)
    flip(write(tmp_path, 5, budget=2000).folder / "zero" / "shard.pt")
    sound, _ = newest_sound(tmp_path)
    assert sound is not None
    withdraw_after(tmp_path, sound.step)
    assert steps(tmp_path) == [1]
    write(tmp_path, 2, budget=2000)
    assert steps(tmp_path) == [2, 1]
    assert not (tmp_path / "step-000005").exists()


def test_invariant_7_newest_and_best_stay_within_the_budget(tmp_path: Path) -> None:
    bests = [1, 1, 3, 3, 3, 3]
    for step, best_step in enumerate(bests, start=1):
        write(tmp_path, step, best_step, budget=3000)
        assert {step, best_step} <= set(steps(tmp_path))
        assert sum(path.stat().st_size for path in tmp_path.rglob("shard.pt")) <= 3000
    assert steps(tmp_path) == [6, 5, 3]
    found = best(tmp_path)
    assert found is not None
    assert found.step == 3


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    incoming=st.integers(1, 100),
    budget=st.integers(1, 600),
    data=st.data(),
)
def test_invariant_7_whatever_goes_it_is_never_the_newest_or_the_best(
    sizes: list[int], incoming: int, budget: int, data: st.DataObject
) -> None:
    best_step = data.draw(st.integers(1, len(sizes)))
    checkpoints = [
        Checkpoint(Path(str(step)), replace(STATE, step=step, best_step=best_step), (FileRecord("a", size, ""),))
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
    assert incoming + sum(sizes) - sum(checkpoint.bytes for checkpoint in going) <= budget
    assert [checkpoint.step for checkpoint in going] == sorted(checkpoint.step for checkpoint in going)


def test_a_budget_that_cannot_do_is_refused_before_training() -> None:
    check_budget(3000, 1000, validated=True)
    check_budget(2000, 1000, validated=False)
    with pytest.raises(CapacityError, match=r"at least 3\.0 kB") as refused:
        check_budget(2999, 1000, validated=True)
    assert refused.value.exit_status == 4


def test_one_larger_than_expected_is_taken_back_rather_than_break_the_budget(tmp_path: Path) -> None:
    write(tmp_path, 1, budget=2500)
    with pytest.raises(CapacityError, match="too small"):
        write(tmp_path, 2, budget=2500, size=1800)
    assert steps(tmp_path) == [1]
    assert not (tmp_path / "step-000002").exists()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CapacityError, "disk is full"),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "Input/output error"),
    ],
)
def test_what_cannot_be_written_is_removed_and_the_one_before_stays(
    tmp_path: Path, error: OSError, kind: type[Exception], said: str
) -> None:
    write(tmp_path, 1)
    with pytest.raises(kind, match=said):
        write(tmp_path, 2, fail=error)
    assert steps(tmp_path) == [1]
    assert not (tmp_path / "step-000002").exists()


def test_a_disk_without_room_is_seen_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="bytes free"):
        save(_Huge(), tmp_path, replace(STATE, step=1), 10**20)  # type: ignore[arg-type]
    assert complete(tmp_path) == []


class _Huge(FileEngine):
    def state_bytes(self) -> int:
        return 10**18

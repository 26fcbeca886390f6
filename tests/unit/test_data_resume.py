"""Preparing that was stopped goes on where it was; what is too large, too long or masked is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.data import build, documents, index
from distft.data.prepare import one_by_one, prepared_folder
from distft.data.splits import SPLITS
from distft.data.store import Prepared
from distft.errors import DataError
from distft.task.prepare import prepare, task_of
from tests.unit.tiny_data import WORDS, job, texts, write_jsonl

SCRIPT = """
import sys, time
from pathlib import Path
from distft.data import documents
from distft.data.prepare import one_by_one, prepared_folder
from distft.task.prepare import task_of
from tests.unit.tiny_data import job

documents.UNIT_BYTES = 3000
folder, model_folder = map(Path, sys.argv[1:])
one_job = job(folder)

def slowly(units, do):
    for report in one_by_one(units, do):
        yield report
        print("unit", flush=True)
        time.sleep(0.3)

prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), slowly)
"""


pytestmark = pytest.mark.usefixtures("own_cache")


class Counting:
    """A runner that tells which units it was given."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, units: Mapping[int, Any], do: Any) -> Any:
        self.numbers = list(units)
        return one_by_one(units, do)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_process_leaves_its_finished_units(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(150)])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(model_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "unit\n"
        os.kill(process.pid, signal.SIGKILL)
    monkeypatch.setattr(documents, "UNIT_BYTES", 3000)
    one_job, runner, told = job(tmp_path), Counting(), []
    folder = prepared_folder(
        one_job,
        model_folder,
        lambda: task_of(one_job, model_folder),
        runner,
        lambda done, units: told.append((done, units)),
    )
    units = told[-1][1]
    assert runner.numbers in (list(range(3, units)), list(range(4, units)))
    assert told[0][0] == runner.numbers[0] + 1
    resumed = contents(folder)
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "elsewhere"))
    assert contents(prepare(one_job, model_folder)) == resumed
    assert not (folder / "units").exists()


def test_an_error_of_one_unit_keeps_the_others_and_damage_is_done_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 3000)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(150)])
    one_job, runner = job(tmp_path), Counting()

    def fails_at_five(units: Mapping[int, Any], do: Any) -> Any:
        for number, unit in units.items():
            if number == 5:
                raise OSError("the node is gone")
            yield do(number, unit)

    with pytest.raises(OSError, match="the node is gone"):
        prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), fails_at_five)
    building = next((tmp_path / "cache" / "prepared").glob("*.building"))
    (building / "units" / "index-00001-00000.arrow").unlink()
    path = building / "tokens-00002-00000.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    (building / "units" / "report-00003.json").write_text("{")
    (building / "tokens-00009-00000.arrow.node-1.partial").write_text("half")
    (building / "tokens-99999-00000.arrow").write_text("of a plan of other units")
    folder = prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), runner)
    assert runner.numbers[:4] == [1, 2, 3, 5]
    resumed = contents(folder)
    assert not [name for name in resumed if name.endswith(".partial") or "99999" in name]
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "elsewhere"))
    assert contents(prepare(one_job, model_folder)) == resumed


def test_what_another_format_began_is_not_used_and_old_beginnings_are_removed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 3000)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(50)])

    def fails(units: Mapping[int, Any], do: Any) -> Any:
        yield do(0, units[0])
        raise OSError("stopped")

    one_job, runner = job(tmp_path), Counting()
    with pytest.raises(OSError, match="stopped"):
        prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), fails)
    building = next((tmp_path / "cache" / "prepared").glob("*.building"))
    monkeypatch.setattr("distft.data.prepare.FORMAT", build.FORMAT + 1)
    os.utime(building, (time.time() - 8 * 24 * 3600,) * 2)
    prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), runner)
    assert runner.numbers[0] == 0
    assert not building.exists()


def test_a_unit_is_written_in_parts_where_it_is_large(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(1500, longest=20)])
    whole = Prepared.open(prepare(job(tmp_path), model_folder))
    monkeypatch.setattr(index, "_PART_ROWS", 500)
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "parts"))
    parts = Prepared.open(prepare(job(tmp_path), model_folder))
    assert len(list(parts.folder.glob("tokens-*"))) == 3
    assert parts.card == whole.card
    for split in SPLITS:
        rows = [[(row.input_ids.tolist(), row.documents) for row in one.rows(split)] for one in (whole, parts)]
        assert rows[0] == rows[1]
        assert parts.documents(split) == whole.documents(split)


def test_a_row_of_40_000_tokens_under_each_policy(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": text} for text in texts(60, longest=10)]
    rows[20]["text"] = " ".join(np.random.default_rng(0).choice(WORDS, 40_000).tolist())
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"1 of 60 documents are longer .* the longest first: a.jsonl row 21"):
        prepare(job(tmp_path, overlong="error"), model_folder)
    for overlong, fate in (("drop", "dropped"), ("truncate", "truncated"), ("split", "split")):
        prepared = Prepared.open(prepare(job(tmp_path, overlong=overlong), model_folder))
        assert sum(fates.get(fate, 0) for fates in prepared.card["rows"].values()) == 1
        assert prepared.card["lengths"]["max"] >= 40_000
        targets = sum(prepared.card["tokens"][split]["supervised"] for split in SPLITS)
        assert (targets > 40_000) == (overlong == "split")
        if overlong != "split":
            assert prepared.card["examples"][fate] == [{"source": "a.jsonl", "row": 21}]
        assert max(len(row.input_ids) for split in SPLITS for row in prepared.rows(split)) <= 64

"""A run's small files: whole or not there, and read past what a kill cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.errors import JobError
from distft.runs import (
    Run,
    append_line,
    read_json,
    read_lines,
    read_new_lines,
    training_curve,
    update_result,
    write_json,
)


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"kind": "train", "step": 1})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    append_line(path, {"kind": "train", "step": 2})
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_new_lines_are_read_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_new_lines(path, 0) == ([], 0)
    append_line(path, {"step": 1})
    records, offset = read_new_lines(path, 0)
    assert records == [{"step": 1}]
    with path.open("a") as file:
        file.write('{"step"')
    assert read_new_lines(path, offset) == ([], offset)
    with path.open("a") as file:
        file.write(': 2}\n{"step": 3}\n')
    records, offset = read_new_lines(path, offset)
    assert [record["step"] for record in records] == [2, 3]
    assert offset == path.stat().st_size


def test_of_a_step_done_again_the_later_line_stands(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5)):
        append_line(path, {"kind": "train", "step": step, "loss": loss})
    append_line(path, {"kind": "validation", "step": 3, "loss": 9.0})
    assert [(line["step"], line["loss"]) for line in training_curve(path)] == [(1, 5.0), (2, 4.5), (3, 3.0)]


def test_a_document_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"status": "running"})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"status": "running"}


def test_fields_of_a_result_are_brought_up_to_date(tmp_path: Path) -> None:
    run = Run(tmp_path)
    update_result(run, status="running")
    update_result(run, step=3)
    assert read_json(run.result) == {"restarts": 0, "test_looks": [], "status": "running", "step": 3}


def test_a_run_is_found_by_name_or_path_and_its_absence_names_the_others(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.yaml").write_text("")
    assert Run.find("one", tmp_path).folder == tmp_path / "one"
    assert Run.find(str(tmp_path / "two"), tmp_path / "elsewhere").name == "two"
    with pytest.raises(JobError, match="one, two"):
        Run.find("three", tmp_path)

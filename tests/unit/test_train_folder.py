"""Where a run's folder is made, and that nothing is computed for one that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.errors import JobError
from distft.train.folder import run_folder
from tests.unit.tiny_runs import job_of, run_of


def test_a_runs_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path: Path) -> None:
    """By root too, who may write to whatever is a folder."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(JobError, match="nothing can be written there") as refused:
        run_folder(job_of("language_modeling", tmp_path), tmp_path / "runs", "sea", resume=False)
    assert refused.value.where == str(tmp_path / "runs")
    assert "--runs DIR" in str(refused.value.fix)


def test_a_new_run_leaves_nothing_but_the_folder_of_all_runs(tmp_path: Path) -> None:
    run = run_folder(job_of("language_modeling", tmp_path), tmp_path / "deep" / "runs", "sea", resume=False)
    assert run.folder == tmp_path / "deep" / "runs" / "sea"
    assert list((tmp_path / "deep" / "runs").iterdir()) == []


def test_a_run_that_may_only_be_read_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("language_modeling", tmp_path / "runs" / "sea", steps=4)
    before = sorted(run.folder.iterdir())
    monkeypatch.setattr("tempfile.TemporaryFile", _read_only)
    with pytest.raises(JobError, match="Read-only file system"):
        run_folder(job_of("language_modeling", run.folder.parent), run.folder.parent, "sea", resume=True)
    assert sorted(run.folder.iterdir()) == before


def _read_only(**_: object) -> None:
    raise OSError(30, "Read-only file system")

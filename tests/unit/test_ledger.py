"""Audit and blame, over a real training run of a tiny model by the plain engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from distft.cli import main
from distft.cli.proofs import audit_lines, audit_problem, audit_table, blame_table
from distft.data.store import Prepared
from distft.errors import DataError, JobError, RunError
from distft.ledger.audit import Audit, audit
from distft.ledger.blame import blame
from distft.ledger.plan import Plan, plan_of
from distft.runs import Run, append_line, read_lines, write_json
from distft.task.prepare import prepare
from distft.train.folder import begin, job_of
from distft.train.worker import work
from distft.world import World
from tests.distributed import tiny

POISON = "§Æ¶Øß¥þðŁ¿¬¦" * 4
POISON_LINE = 91


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    """Two and a half epochs over 91 documents, each a row; the last line of the corpus is poison."""
    folder = tmp_path_factory.mktemp("ledger")
    tiny.make(folder)
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": POISON}) + "\n")
    settings = ["data.packing=false", "data.overlong=truncate", "data.splits={validation: 0.0, test: 0.0}"]
    job = tiny.job(folder, *settings, "train.epochs=2.5", "train.learning_rate=0.02")
    prepared, run = prepare(job, folder / "model"), tiny.run_of(folder, "whole")
    begin(job, run)
    write_json(run.card, Prepared.open(prepared).card)
    work(job, World(), run, prepared, folder / "model", kind="plain")
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Run:
    """A copy of the run, to spoil."""
    return Run(Path(shutil.copytree(tiny.run_of(home, "whole").folder, tmp_path / "runs" / "whole")))


def plan(run: Run) -> Plan:
    return plan_of(job_of(run), run)


def audited(run: Run) -> Audit:
    return audit(plan(run), run)


def change(run: Run, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Rewrites the log."""
    lines = edit(list(read_lines(run.metrics)))
    run.metrics.unlink()
    for line in lines:
        append_line(run.metrics, line)


def without(lines: list[dict[str, Any]], *steps: int) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] != "train" or line["step"] not in steps]


def step_of(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    return next(line for line in lines if line["kind"] == "train" and line["step"] == step)


def test_invariant_3_a_whole_run_used_every_row_once_an_epoch(run: Run) -> None:
    found = audited(run)
    assert found.sound
    assert (found.steps, found.planned, found.rows, found.finished) == (33, 33, 91, True)
    assert [(epoch.rows, epoch.once, epoch.more, epoch.never) for epoch in found.epochs] == [
        (91, 91, 0, 0),
        (91, 91, 0, 0),
        (46, 46, 0, 0),
    ]
    assert found.losses_checked == 33
    said = "\n".join(audit_lines(found))
    assert "all 91 rows once in each of 2 whole epochs, and 46 of 91 rows once in epoch 3" in said


def test_a_corrupted_digest_is_named_with_its_step_and_rows(run: Run) -> None:
    planned = plan(run)
    wrong = "0" * 32

    def edit(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        step_of(lines, 12)["sample_digest"] = wrong
        return lines

    change(run, edit)
    found = audited(run)
    (one,) = found.disagreements
    assert (one.step, one.recorded, one.expected) == (12, wrong, planned.digest(planned.step(12)))
    assert one.rows == tuple(planned.step(12).tolist())
    assert sum(epoch.never for epoch in found.epochs) == 7  # nobody knows which rows those were
    problem = audit_problem(found)
    assert wrong in problem
    assert str(one.expected) in problem


def test_a_row_used_twice_is_counted(run: Run) -> None:
    def edit(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        step_of(lines, 5)["sample_digest"] = step_of(lines, 3)["sample_digest"]
        return lines

    change(run, edit)
    found = audited(run)
    assert not found.sound
    assert "those of step 3" in found.disagreements[0].problem
    first = found.epochs[0]
    assert (first.once, first.more, first.never) == (91 - 14, 7, 7)


def test_a_missing_step_is_found(run: Run) -> None:
    change(run, lambda lines: without(lines, 4))
    found = audited(run)
    assert [(one.step, one.problem) for one in found.disagreements] == [(4, "the log has no such step")]
    assert found.epochs[0].never == 7
    assert "the log has no such step" in audit_problem(found)


def test_a_run_that_is_not_finished_is_sound_as_far_as_it_came(run: Run) -> None:
    change(run, lambda lines: [line for line in lines if line["step"] <= 10 and line.get("event") != "finished"])
    found = audited(run)
    assert found.sound
    assert not found.finished
    assert [(epoch.rows, epoch.once) for epoch in found.epochs] == [(70, 70)]
    assert "the run is not finished" in "\n".join(audit_lines(found))


def test_what_happened_on_the_way_is_told_by_name(run: Run) -> None:
    def edit(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        steps = {line["step"]: line for line in lines if line["kind"] == "train"}
        torn = {**steps[8], "sample_digest": "0" * 32}  # of an attempt whose line no longer stands
        steps[20] |= {"loss": None, "grad_norm": None, "skipped": True}
        for step in range(9, 34):
            steps[step]["world_size"] = 3
        return [*(steps[step] for step in range(1, 8)), torn, *(steps[step] for step in range(7, 34))]

    change(run, edit)
    found = audited(run)
    assert found.sound, audit_problem(found)
    assert (found.redone, found.resizes, found.skipped) == ((7, 8), ((9, 1, 3),), (20,))
    assert sum(epoch.left_out for epoch in found.epochs) == 7
    assert found.losses_checked == 32
    said = "\n".join(audit_lines(found))
    assert "2 steps (7 to 8)" in said
    assert "from step 9 on: 3 workers, 1 before" in said
    assert "but for the 7 of steps left out" in said


def test_losses_of_rows_that_do_not_add_up_are_found(run: Run) -> None:
    losses = np.fromfile(run.row_losses, dtype="<f4")
    losses[6 * 7] *= 1.01
    losses.tofile(run.row_losses)
    (one,) = audited(run).disagreements
    assert one.step == 7
    assert "the losses of its rows" in one.problem


def test_the_poison_row_comes_first(run: Run, home: Path) -> None:
    planned = plan(run)
    poison = next(row.index for row in planned.rows if planned.prepared.document(row.documents[0]).row == POISON_LINE)
    steps = [step for step in range(1, planned.order.steps + 1) if poison in planned.step(step)]
    found = blame(planned, run, home / "model", steps[1])
    assert found.rows[0].row == poison
    assert found.rows[0].sources == (f"corpus.jsonl:{POISON_LINE}",)
    assert found.rows[0].text.startswith(POISON[:8])
    assert found.rows[0].loss > found.rows[1].loss + 0.5
    assert sum(row.share or 0.0 for row in found.rows) == pytest.approx(1.0)
    assert sorted(row.row for row in found.rows) == sorted(planned.step(steps[1]).tolist())
    record = next(line for line in read_lines(run.metrics) if line["kind"] == "train" and line["step"] == steps[1])
    assert found.loss == pytest.approx(record["loss"], rel=1e-6)
    weighed = sum(row.loss * row.supervised_tokens for row in found.rows) / record["supervised_tokens"]
    assert weighed == pytest.approx(record["loss"], rel=1e-6)


def test_the_rows_of_a_step_that_ended_the_run_can_be_blamed(home: Path, tmp_path: Path) -> None:
    job = job_of(tiny.run_of(home, "whole"))
    run = Run(tmp_path / "runs" / "ended")
    planned = plan(tiny.run_of(home, "whole"))
    begin(job, run)
    write_json(run.card, planned.prepared.card)
    with pytest.raises(RunError) as caught:
        work(job, World(), run, planned.prepared.folder, home / "poisoned", kind="plain")
    step = len([line for line in read_lines(run.metrics) if line["kind"] == "train"]) + 1
    assert f"step {step}:" in str(caught.value)
    found = blame(planned, run, home / "poisoned", step)
    assert found.rows[0].sources == ("corpus.jsonl:8",)
    assert not np.isfinite(found.rows[0].loss)
    assert np.isfinite(found.rows[1].loss)
    assert found.as_json()["rows"][0]["loss"] is None
    with pytest.raises(JobError, match="has not made step"):
        blame(planned, run, home / "poisoned", step + 1)


def test_steps_that_cannot_be_blamed_are_refused(run: Run, home: Path) -> None:
    planned = plan(run)
    for step in (34, 1000):
        with pytest.raises(JobError, match="has not made step") as caught:
            blame(planned, run, home / "model", step)
        assert "1 to 33" in str(caught.value)
    with run.row_losses.open("r+b") as file:
        file.truncate(4 * 7 * 10)
    with pytest.raises(RunError, match="were not kept"):
        blame(planned, run, home / "model", 11)
    change(run, lambda lines: [{**line, "sample_digest": "0" * 32} for line in lines])
    with pytest.raises(RunError, match="not the planned ones"):
        blame(planned, run, home / "model", 3)


def test_prepared_data_that_is_gone_can_be_made_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="no longer in the cache") as caught:
        plan(run)
    assert f"from the job's file in {job_of(run).folder}: distft prepare JOB" in str(caught.value)


def test_on_the_command_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("audit", run) == 0
    assert "Sound: all 91 rows once" in capsys.readouterr().out
    assert ended("blame", run, "--step", "3", "--top", "2", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    change(run, lambda lines: without(lines, 4))
    assert ended("audit", run, "--json") == 5
    said = capsys.readouterr()
    assert json.loads(said.out)["sound"] is False
    assert "step 4: the log has no such step" in said.err


def ended(command: str, run: Run, *options: str) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as caught:
        main([command, str(run.folder), *options])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("width", [60, 120])
def test_tables_fit_the_terminal(run: Run, home: Path, width: int) -> None:
    console = Console(width=width, record=True, force_terminal=False)
    console.print(audit_table(audited(run)))
    console.print(blame_table(blame(plan(run), run, home / "model", 2), 5))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("used once" in line for line in lines)
    assert any("corpus.jsonl" in line.replace("\n", "") for line in lines) or width < 80

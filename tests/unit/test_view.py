"""What a person sees: on a terminal, and where output goes to a file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from distft.cli import view as view_module
from distft.cli.trials import about, ended_line, failure_lines, next_commands, progress_line, result_lines, shown
from distft.cli.view import View, describe_step
from distft.report.words import duration
from distft.runs import Run
from distft.tuning.progress import SearchProgress
from distft.tuning.trials import Status, Trial, trial_id

STEP = {
    "kind": "train",
    "step": 3,
    "steps": 12,
    "loss": 2.5,
    "tokens_per_second": 1234.5,
    "mfu": 0.5,
    "peak_memory_bytes": 2_100_000_000,
    "step_seconds": 20.0,
}


def test_a_step_is_one_line_with_the_time_left() -> None:
    assert describe_step(STEP) == "step 3/12  loss 2.5000  1,234 tokens/s  MFU 50%  2.1 GB  3 min 00 s left"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.42, 12, 185, 7800)] == ["0.4 s", "12 s", "3 min 05 s", "2 h 10 min"]


def test_plain_output_is_rare_and_has_no_colour() -> None:
    """Where there is no terminal, a hundred quick steps do not make a hundred lines."""
    output = io.StringIO()
    with View(Console(file=output, force_terminal=False)) as view:
        view.stage("train")
        for _ in range(100):
            view.record(STEP)
        view.record({"kind": "validation", "step": 3, "loss": 2.0})
        view.record({"kind": "event", "event": "restart", "step": 2, "reason": "from the checkpoint [of] step 2"})
        view.stage("export")
    lines = output.getvalue().splitlines()
    assert lines[0] == "  step 3  validation loss 2.0000"
    assert lines[1] == "  step 2  restart: from the checkpoint [of] step 2"
    assert [line.split()[:2] for line in lines[2:]] == [["✓", "train"], ["✓", "export"]]
    assert "\x1b" not in output.getvalue()


def test_a_failed_stage_is_crossed_out() -> None:
    output = io.StringIO()
    try:
        with View(Console(file=output, force_terminal=False)) as view:
            view.stage("data")
            raise RuntimeError
    except RuntimeError:
        pass
    assert output.getvalue().startswith("✗ data")


def test_a_terminal_shows_the_step_as_it_goes() -> None:
    output = io.StringIO()
    with View(Console(file=output, force_terminal=True, width=100)) as view:
        view.stage("train")
        view.record(STEP)
    assert "loss 2.5000" in output.getvalue()


def trial(number: int, status: Status, objective: float | None = None, reason: str | None = None) -> Trial:
    params = {"train.learning_rate": 1e-5 * (number + 1), "train.batch_size": 32}
    return Trial(trial_id(number), params, status, 8, 1024 * (number + 1), objective, reason=reason)


TRIALS = [
    trial(0, "finished", 3.5),
    trial(1, "stopped", 3.25),
    trial(2, "failed", reason="out of memory [cuda]"),
    trial(3, "running"),
]
PROGRESS = SearchProgress(TRIALS, 12, "validation.loss", "min", 250.0)


def plain(width: int = 100, height: int = 40) -> tuple[View, io.StringIO]:
    """A view on a terminal without colours."""
    output = io.StringIO()
    return View(Console(file=output, force_terminal=True, width=width, height=height, no_color=True)), output


def lines_of(output: io.StringIO) -> list[str]:
    """What was printed, without bold, dim and movements of the cursor."""
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue()).splitlines()]


def test_a_search_is_a_table_with_its_best_marked_and_the_time_left() -> None:
    view, output = plain()
    with view:
        view.stage("search")
        view.trials(PROGRESS)
    lines = lines_of(output)
    assert any(line.split() == ["trial", "rate", "size", "tokens", "loss", "state"] for line in lines)
    rows = [line.split() for line in lines]
    assert ["000", "1e-5", "32", "1,024", "3.500", "finished"] in rows
    assert ["001", "★", "2e-5", "32", "2,048", "3.250", "stopped"] in rows
    assert ["003", "4e-5", "32", "4,096", "-", "running"] in rows
    assert any("failed 002: out of memory [cuda]" in line for line in lines)
    assert any(line.startswith("best so far 001: validation.loss 3.250 with learning_rate 2e-5,") for line in lines)


@pytest.mark.parametrize("height", [15, 24, 50])
def test_a_hundred_trials_fit_a_terminal_with_the_best_and_those_that_run(height: int) -> None:
    many = [trial(number, "stopped", 4 - number / 100 if number != 40 else 1.0) for number in range(97)]
    many += [trial(number, "running") for number in (97, 98, 99)]
    view, output = plain(80, height)
    view.console.print(view._table(replace(PROGRESS, trials=many)))
    lines = lines_of(output)
    assert len(lines) < height
    assert any("040 ★" in line for line in lines)
    ended = [line for line in lines if "stopped" in line]
    if height > 15:
        assert all(any(f"{number:03d} " in line for line in lines) for number in (97, 98, 99))
        assert "096" in ended[-1]
        assert f"and {100 - len(ended) - 3} more" in lines


def test_the_best_is_shown_where_more_run_than_there_are_lines() -> None:
    many = [trial(0, "finished", 2.0), *(trial(number, "running") for number in range(1, 30))]
    assert [one.number for one in shown(many, "min", 4)] == [0, 27, 28, 29]
    assert [one.number for one in shown(many, "min", 1)] == [0]


def test_a_search_without_a_terminal_says_a_line_for_each_trial_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    with View(Console(file=output, force_terminal=False, width=60)) as view:
        view.stage("search")
        for _ in range(50):
            view.trials(PROGRESS)
        monkeypatch.setattr(view_module, "PLAIN_INTERVAL_SECONDS", 0)
        view.trials(replace(PROGRESS, trials=[*TRIALS[:3], replace(TRIALS[3], status="stopped", objective=3.75)]))
    lines = output.getvalue().splitlines()
    assert lines[:5] == [
        "  trial 000 finished after 1,024 tokens: validation.loss 3.500 with learning_rate 1e-5, batch_size 32",
        "  trial 001 stopped after 2,048 tokens: validation.loss 3.250 with learning_rate 2e-5, batch_size 32",
        "  trial 002 failed after 3,072 tokens: learning_rate 3e-5, batch_size 32: out of memory [cuda]",
        "  trial 003 stopped after 4,096 tokens: validation.loss 3.750 with learning_rate 4e-5, batch_size 32",
        "  best so far 001: validation.loss 3.250 with learning_rate 2e-5, batch_size 32 · 4 of 12 trials done"
        " (1 failed) · about 4 min left",
    ]
    assert lines[5].startswith("✓ search")
    assert len(lines) == 6
    assert "\x1b" not in output.getvalue()


def test_a_trial_that_is_taken_up_again_is_told_when_it_ends_again() -> None:
    output = io.StringIO()
    with View(Console(file=output, force_terminal=False)) as view:
        for status in ("finished", "running", "finished"):
            view.trials(replace(PROGRESS, trials=[replace(TRIALS[0], status=status)]))
    assert len([line for line in output.getvalue().splitlines() if "trial 000 finished" in line]) == 2


def test_before_any_validation_a_search_has_no_best_and_no_time() -> None:
    begun = SearchProgress([trial(0, "running")], 4, "validation.accuracy", "max")
    assert progress_line(begun) == "no validation.accuracy yet · 0 of 4 trials done"


def test_more_can_be_better() -> None:
    line = progress_line(replace(PROGRESS, metric="validation.accuracy", mode="max", seconds_left=None))
    assert line.startswith("best so far 000: validation.accuracy 3.500 with")
    assert line.endswith("3 of 12 trials done (1 failed)")


def test_a_failure_before_any_validation_has_its_reason_in_place_of_an_objective() -> None:
    assert ended_line(TRIALS[2], "validation.loss").endswith("batch_size 32: out of memory [cuda]")


def test_trials_that_fail_alike_share_a_line() -> None:
    failed = [trial(0, "failed", reason="it\nraised"), *TRIALS, trial(4, "failed", reason="it raised")]
    assert failure_lines(failed) == ["failed 000, 004: it raised", "failed 002: out of memory [cuda]"]


def test_estimates_are_as_coarse_as_they_are_sure() -> None:
    shown = [about(seconds) for seconds in (20, 61, 3000, 3595, 3660, 7900)]
    assert shown == ["less than a minute", "about 1 min", "about 50 min", "about 1 h", "about 1 h", "about 2 h 10 min"]


def test_the_end_of_a_search_names_the_best_what_mattered_and_where_the_pictures_are() -> None:
    shares = {"train.learning_rate": 0.8, "train.batch_size": 0.2}
    found = {"metric": "validation.loss", "mode": "min", "importance": shares}
    assert result_lines(Run(Path("runs/a")), TRIALS, found) == [
        "failed 002: out of memory [cuda]",
        "Best 001: validation.loss 3.250 with learning_rate 2e-5, batch_size 32",
        "Importance learning_rate 80%, batch_size 20%",
        "Learning curves: runs/a/search/learning-curves.png,"
        " parallel coordinates: runs/a/search/parallel-coordinates.png",
    ]


def test_the_best_settings_go_into_the_next_command_to_the_last_digit() -> None:
    best = replace(TRIALS[0], params={"train.learning_rate": 1 / 3e5, "train.epochs": 2})
    assert next_commands("distft", Path("job.yaml"), "tuned", best) == [
        "distft run job.yaml --name tuned --resume",
        "distft run job.yaml --name tuned-best --set search=null"
        " --set train.learning_rate=3.3333333333333333e-06 --set train.epochs=2",
    ]

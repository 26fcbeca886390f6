"""What a person sees: on a terminal, and where output goes to a file."""

from __future__ import annotations

import io

from rich.console import Console

from distft.cli.view import View, describe_step, duration

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

"""The scaling benchmark's arithmetic, on runs whose files are written here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.scaling import Point, as_table, draw, interval, main, measure, parser, points, zero_bytes
from distft.orchestrate.train.places import Place
from distft.runs import Run, append_line, write_json


def write_run(folder: Path, point: Point, seconds: float, *, memory: int = 2_000_000_000) -> Path:
    run = Run(folder)
    accumulation = -(-point.batch_size // point.workers)
    for step, took in enumerate((9 * seconds, seconds, seconds, seconds), start=1):
        append_line(
            run.metrics,
            {
                "kind": "train",
                "step": step,
                "step_seconds": took,
                "tokens_per_second": point.batch_size * 100 / took,
                "peak_memory_bytes": memory,
                "accumulation": accumulation,
                "micro_batch_size": 1,
            },
        )
    write_json(run.resolved, {"decisions": {"model.dtype": {"value": "bf16"}}})
    write_json(run.group, 5.0)
    for rank in range(point.workers):
        write_json(run.logs / f"rank-{rank}.json", asdict(Place(rank, 5.0, 1, 1, f"node {rank // 2}", "host")))
    write_json(run.plan, {"predicted": {"parameters": 1000, "trained": 1000, "device_bytes": memory + 1}})
    return folder


def test_strong_keeps_the_batch_and_weak_each_workers_share() -> None:
    made = list(points(["strong", "weak"], [2], [1, 2, 4], 8))
    assert [(one.kind, one.workers, one.batch_size) for one in made] == [
        ("strong", 1, 8),
        ("strong", 2, 8),
        ("strong", 4, 8),
        ("weak", 1, 2),
        ("weak", 2, 4),
        ("weak", 4, 8),
    ]


@pytest.mark.parametrize(("stage", "each"), [(0, 16), (1, 4 + 12 / 4), (2, 2 + 14 / 4), (3, 16 / 4)])
def test_zeros_formula(stage: int, each: float) -> None:
    """ZeRO, arXiv 1910.02054, figure 1."""
    assert zero_bytes(1000, 1000, stage, 4, "bf16") == 1000 * each
    assert zero_bytes(1000, 1000, stage, 1, "fp32") == 16_000


def test_intervals_hold_the_median_and_widen_with_noise() -> None:
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    calm, noisy = interval([10, 10.1, 9.9]), interval([10, 20, 1])
    assert calm[1] <= calm[0] <= calm[2]
    assert noisy[2] - noisy[1] > calm[2] - calm[1]


def test_figures_of_runs(tmp_path: Path) -> None:
    """A quarter of the rows takes 0.25 s of arithmetic: in a step of 0.3125 s a fifth is waiting: 80 % efficient."""
    one, two = Point("strong", 2, 1, 4), Point("strong", 2, 4, 4)
    found = {
        one: [write_run(tmp_path / f"one-{n}", one, 1.0) for n in range(3)],
        two: [write_run(tmp_path / f"two-{n}", two, 0.3125, memory=10**9) for n in range(3)],
    }
    alone, four = measure(found)
    assert alone.efficiency == (1.0, 1.0, 1.0)
    assert alone.communication is None
    assert alone.step_seconds == 1.0
    assert four.efficiency[0] == pytest.approx(0.8)
    assert four.communication == pytest.approx(0.2)
    assert four.nodes == 2
    assert four.peak_memory_bytes == 10**9
    assert four.zero_bytes == 5500
    table = as_table([alone, four])
    assert "80%" in table
    assert all(line.count("|") == table.splitlines()[0].count("|") for line in table.splitlines())
    assert all(path.stat().st_size > 5_000 for path in draw([alone, four], tmp_path))


def test_a_job_that_cannot_run_ends_it_with_its_own_words(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: {source: nowhere}\ntask: {kind: language_modeling}\ndata: {source: none.txt}\n")
    with pytest.raises(SystemExit, match=r"none\.txt"):
        main([str(job), "--workers", "1", "--stages", "0", "--repeats", "1", "--out", str(tmp_path / "out")])


def test_the_command_has_defaults_that_run_here() -> None:
    arguments = parser().parse_args([])
    assert arguments.job.exists()
    assert max(arguments.workers) == 2

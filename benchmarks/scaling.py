"""How training scales: tokens a second, efficiency, memory and traffic over workers, nodes and ZeRO stages.

``python -m benchmarks.scaling JOB.yaml --workers 1 2 4 8 --stages 0 1 2 3`` runs the job for some steps at each number
of workers through ``distft train``, so on whatever Ray cluster the job names: here, or on 64 GPUs. Strong: the batch
stays. Weak: it grows with the workers. Each point is repeated; figures are medians over all timed steps of all repeats,
with 95 % bootstrap intervals over repeats. It writes scaling.json, scaling.md and pictures, and the command that
repeats it.

The share of communication is measured, not modelled: what a step takes beyond the same passes on one worker, which
sends nothing. Workers that share one machine's cores or memory also wait for those, which it cannot tell apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance
from distft.config import Job
from distft.config.sections import SourcesSection
from distft.orchestrate.train.places import read_places
from distft.runs import Run, read_json, training_curve
from distft.world import runs_folder

ROOT = Path(__file__).parents[1]
RESAMPLES = 2000


@dataclass(frozen=True)
class Point:
    """What is run.

    Attributes:
        kind: ``strong`` or ``weak``.
        stage: ZeRO's.
        workers: Ranks.
        batch_size: Rows of a step.
    """

    kind: str
    stage: int
    workers: int
    batch_size: int

    @property
    def name(self) -> str:
        """Of its runs."""
        return f"{self.kind}-zero{self.stage}-w{self.workers}"


def points(kinds: Sequence[str], stages: Sequence[int], workers: Sequence[int], batch_size: int) -> Iterator[Point]:
    """All that is run: ``batch_size`` rows, with weak scaling at the most workers, and as many a worker elsewhere."""
    each = max(1, batch_size // max(workers))
    for kind, stage, count in itertools.product(kinds, stages, workers):
        yield Point(kind, stage, count, batch_size if kind == "strong" else each * count)


@dataclass(frozen=True)
class Measured:
    """A point's figures.

    Attributes:
        point: It.
        nodes: Machines that the workers were on.
        tokens_per_second: Over all workers: median, low, high.
        efficiency: Of the speed of the fewest workers at this stage, by worker: median, low, high, in which both
            speeds are uncertain.
        step_seconds: Median.
        communication: The share of a step that the same passes on one worker do not take; None where there is none.
        peak_memory_bytes: Of a rank, the most.
        predicted_memory_bytes: By the planner, corrected by the cluster's runs.
        zero_bytes: What ZeRO's formula gives for weights, gradients and optimizer (arXiv 1910.02054, figure 1).
        repeats: Tokens a second of each repeat.
    """

    point: Point
    nodes: int
    tokens_per_second: tuple[float, float, float]
    efficiency: tuple[float, float, float]
    step_seconds: float
    communication: float | None
    peak_memory_bytes: int
    predicted_memory_bytes: int | None
    zero_bytes: int | None
    repeats: tuple[float, ...]


def run(point: Point, repeat: int, arguments: argparse.Namespace, runs: Path) -> Path:
    """Trains for the steps of a point; the run's folder."""
    name = f"{point.name}-{repeat}"
    job = Job.load(arguments.job, arguments.set)
    settings = [
        f"cluster.workers={point.workers}",
        f"zero.stage={point.stage}",
        f"train.batch_size={point.batch_size}",
        f"train.steps={arguments.steps}",
        "train.validate_every=1.0",
        *([] if isinstance(job.data.source, SourcesSection) else ["data.splits={validation: 0.0, test: 0.0}"]),
        "checkpoint.every=1.0",
        "track.tensorboard=false",
        *arguments.set,
    ]
    command = [sys.executable, "-m", "distft", "train", str(arguments.job), "--name", name, "--runs", str(runs)]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}\n{done.stderr[-4000:]}")
    shutil.rmtree(Run(runs / name).checkpoints, ignore_errors=True)  # all runs' together would fill a disk
    return runs / name


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The timed steps of a run: the first is not."""
    return training_curve(folder / "metrics.jsonl")[1:]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the percentile bootstrap's 95 % interval of it (Efron 1979); of one value alone, it thrice."""
    draw = np.random.default_rng(0)
    drawn = np.median(draw.choice(np.asarray(values), size=(RESAMPLES, len(values))), axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return statistics.median(values), float(low), float(high)


def ratio_interval(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of two medians, and its 95 % interval by the same bootstrap, drawn from each by itself."""
    draw = np.random.default_rng(0)
    drawn = [np.median(draw.choice(np.asarray(one), size=(RESAMPLES, len(one))), axis=1) for one in (values, base)]
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5])
    return statistics.median(values) / statistics.median(base), float(low), float(high)


def zero_bytes(parameters: int, trained: int, stage: int, workers: int, dtype: str) -> int:
    """Weights, gradients and optimizer by ZeRO's formula: ``(2 + 2 + 12) Psi`` in bf16, ``(4 + 4 + 8) Psi`` in fp32."""
    weight, state = (2, 12) if dtype == "bf16" else (4, 8)
    weights = weight * parameters / (workers if stage == 3 else 1)
    gradients = weight * trained / (workers if stage >= 2 else 1)
    return math.ceil(weights + gradients + state * trained / (workers if stage >= 1 else 1))


def measure(found: dict[Point, list[Path]]) -> list[Measured]:
    """The figures of all points from their runs."""
    curves = {point: [steps_of(folder) for folder in folders] for point, folders in found.items()}
    speeds = {
        point: tuple(statistics.median(step["tokens_per_second"] for step in curve) for curve in each)
        for point, each in curves.items()
    }
    fewest = {
        (point.kind, point.stage): min(
            (one for one in speeds if (one.kind, one.stage) == (point.kind, point.stage)), key=lambda one: one.workers
        )
        for point in speeds
    }
    return [
        _measured(point, folders, curves[point], speeds[point], fewest[point.kind, point.stage], speeds, curves)
        for point, folders in found.items()
    ]


def _measured(
    point: Point,
    folders: Sequence[Path],
    each: Sequence[Sequence[dict[str, Any]]],
    speed: tuple[float, ...],
    base: Point,
    speeds: dict[Point, tuple[float, ...]],
    curves: dict[Point, list[list[dict[str, Any]]]],
) -> Measured:
    steps = [step for curve in each for step in curve]
    ratio = (1.0, 1.0, 1.0) if point == base else ratio_interval(speed, speeds[base])
    low, middle, high = (value * base.workers / point.workers for value in (ratio[1], ratio[0], ratio[2]))
    plan = folders[0] / "plan.json"
    predicted = read_json(plan)["predicted"] if plan.exists() else None
    resolved = read_json(folders[0] / "resolved.json")["decisions"]
    return Measured(
        point,
        nodes_of(Run(folders[0])),
        interval(speed),
        (middle, low, high),
        statistics.median(step["step_seconds"] for step in steps),
        _communication(point, base, curves),
        max(int(step["peak_memory_bytes"]) for step in steps),
        None if predicted is None else int(predicted["device_bytes"]),
        None
        if predicted is None
        else zero_bytes(
            predicted["parameters"],
            predicted["trained"],
            point.stage,
            point.workers,
            resolved["model.dtype"]["value"],
        ),
        speed,
    )


def nodes_of(made: Run) -> int:
    """How many nodes a run's workers were on, as they wrote down themselves."""
    return len({place.node for place in read_places(made, read_json(made.group))})


def _communication(point: Point, base: Point, curves: dict[Point, list[list[dict[str, Any]]]]) -> float | None:
    """One less the seconds of a worker's passes, as one worker alone takes them, over the step's."""
    if base.workers != 1 or point.workers == 1:
        return None

    def seconds_and_passes(one: Point) -> tuple[float, float]:
        steps = [step for curve in curves[one] for step in curve]
        passes = statistics.median(step["accumulation"] * step["micro_batch_size"] for step in steps)
        return statistics.median(step["step_seconds"] for step in steps), passes

    (alone, rows_alone), (seconds, rows) = seconds_and_passes(base), seconds_and_passes(point)
    return max(0.0, 1 - alone * rows / rows_alone / seconds)


def as_table(measured: Sequence[Measured]) -> str:
    """Markdown."""
    lines = [
        "| scaling | ZeRO | workers | nodes | rows | tokens/s (95 %) | efficiency (95 %) | communication "
        "| memory GB | planned | ZeRO formula |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in measured:
        point, (rate, low, high), share = one.point, one.tokens_per_second, one.efficiency
        lines.append(
            f"| {point.kind} | {point.stage} | {point.workers} | {one.nodes} | {point.batch_size} "
            f"| {rate:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%}) "
            f"| {'' if one.communication is None else f'{one.communication:.0%}'} | {one.peak_memory_bytes / 1e9:.2f} "
            f"| {_gigabytes(one.predicted_memory_bytes)} | {_gigabytes(one.zero_bytes)} |"
        )
    return "\n".join(lines)


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


def draw(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Pictures: tokens a second, efficiency and memory over workers, a line for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for kind in sorted({one.point.kind for one in measured}):
        figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
        for stage in sorted({one.point.stage for one in measured}):
            line = [one for one in measured if (one.point.kind, one.point.stage) == (kind, stage)]
            workers = [one.point.workers for one in line]
            for panel, values in zip(panels, _series(line), strict=True):
                middle = [value[0] for value in values]
                spread = [[value[0] - value[1] for value in values], [value[2] - value[0] for value in values]]
                panel.errorbar(workers, middle, yerr=spread, marker="o", capsize=3, label=f"ZeRO {stage}")
        for panel, title in zip(panels, ("tokens a second", "efficiency", "memory of a rank, GB"), strict=True):
            panel.set(title=title, xlabel="workers", xticks=sorted({one.point.workers for one in measured}))
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        panels[1].axhline(1, color="grey", linewidth=1, linestyle="--")
        panels[2].legend()
        figure.suptitle(f"{kind} scaling")
        written.append(folder / f"scaling-{kind}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def _series(line: Sequence[Measured]) -> tuple[list[tuple[float, ...]], ...]:
    memory = [(one.peak_memory_bytes / 1e9,) * 3 for one in line]
    return [one.tokens_per_second for one in line], [one.efficiency for one in line], memory


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    made.add_argument("job", type=Path, nargs="?", default=ROOT / "launch" / "quickstart.yaml", help="a job file")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    made.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    made.add_argument("--kinds", nargs="+", default=["strong", "weak"], choices=("strong", "weak"))
    made.add_argument("--batch-size", type=int, default=None, help="rows of a step at the most workers [the job's]")
    made.add_argument("--steps", type=int, default=6, help="of each run; the first is not timed")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the job")
    made.add_argument(
        "--out", type=Path, default=runs_folder() / "scaling", help="where results are written; all nodes see it"
    )
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Runs all points, repeat by repeat, so that a slow hour does not fall on one of them; writes the results."""
    words = sys.argv[1:] if words is None else words
    arguments = parser().parse_args(words)
    batch_size = arguments.batch_size or Job.load(arguments.job, arguments.set).train.batch_size
    wanted = list(points(arguments.kinds, arguments.stages, sorted(arguments.workers), batch_size))
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.scaling {shlex.join(words)}"
    print(f"{len(wanted)} points x {arguments.repeats} repeats; the command: {command}", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as temporary:
        found: dict[Point, list[Path]] = {point: [] for point in wanted}
        for repeat, point in itertools.product(range(arguments.repeats), wanted):
            folder = run(point, repeat, arguments, Path(temporary).resolve())
            found[point].append(folder)
            rate = statistics.median(step["tokens_per_second"] for step in steps_of(folder))
            print(f"{point.name} repeat {repeat + 1}: {rate:,.0f} tokens/s", flush=True)
        measured = measure(found)
    document = {"command": command, "provenance": provenance(), "results": [asdict(one) for one in measured]}
    (arguments.out / "scaling.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "scaling.md").write_text(f"`{command}`\n\n{as_table(measured)}\n", encoding="utf-8")
    pictures = draw(measured, arguments.out)
    print(as_table(measured))
    largest = max(arguments.workers)
    print(f"\nWritten to {arguments.out}: scaling.json, scaling.md, {', '.join(path.name for path in pictures)}")
    print(
        "The same on 64 GPUs, from a machine of their Ray cluster; with 1 among --workers it tells communication too:"
    )
    scaled = batch_size * max(1, 64 // largest)
    print(f"  python -m benchmarks.scaling {arguments.job} --workers 8 16 32 64 --stages 1 2 3 --batch-size {scaled}")


if __name__ == "__main__":
    main()

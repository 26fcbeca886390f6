"""What was predicted of a run beside what was measured: kept with the run, and learnt from for the next one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.log import logger
from distft.model.shape import Shape
from distft.plan import calibration
from distft.plan.calibration import Observation
from distft.plan.choices import Choices
from distft.plan.devices import known
from distft.plan.estimate import Estimate, Workload, estimate, first_setup
from distft.plan.fit import Subject, Way
from distft.plan.hardware import Hardware, has_rdma
from distft.plan.memory import memory
from distft.plan.speed import Links, Rates
from distft.runs import Run, training_curve, write_json
from distft.world import World

#: Bytes that a process takes on beside its model once that is there: the model's own code, DeepSpeed, threads of gloo
#: and oneDNN; 266 MB measured on Linux with torch 2.13 for CPU.
IMPORTED_LATER = 266_000_000

#: Steps that are needed to measure one: the first takes longer, and so may others.
LEAST_STEPS = 3


@dataclass(frozen=True)
class Forecast:
    """What a group of workers is expected to take.

    Attributes:
        estimate: Memory, and seconds of a step.
        subject: What is trained.
        key: What its runs are remembered under.
        links: The network between its nodes, where that was measured and counts.
    """

    estimate: Estimate
    subject: Subject
    key: str
    links: Links | None = None


def forecast(
    job: Job,
    shape: Shape,
    choices: Choices,
    world: World,
    hardware: Hardware,
    peak_flops: float,
    *,
    process_bytes: int,
    labels: int,
    attended_tokens: float,
    fill: float,
    links: Links | None = None,
) -> Forecast:
    """Predicts a run from what is known as its workers begin.

    Args:
        job: The job.
        shape: Its model.
        choices: What was decided.
        world: This rank's place.
        hardware: Its device.
        peak_flops: Of the device, for the type that was decided.
        process_bytes: What the process holds in memory before the model is loaded.
        labels: How many labels a classifier has.
        attended_tokens: The mean length of the segment that a token lies in.
        fill: The share of rows that is no padding.
        links: The network between the nodes, measured with TCP: what gloo has, and NCCL where there is nothing faster.
    """
    subject = Subject.of(job, shape, labels)
    setup = first_setup(job, hardware, choices, -(-world.size // world.local_size))
    setup = replace(setup, attended_tokens=round(attended_tokens), fill=fill)
    key = calibration.key_of(hardware, choices.dtype.value)
    seen = calibration.read(calibration.calibration_path(), key)
    device = known(hardware.name) if hardware.device_type == "cuda" else None
    if device is None:
        rates = Rates.of_cpu(peak_flops, hardware.at_once(job.cluster.threads))
    else:
        rates = Rates.of(device, choices.dtype.value)
    if setup.nodes == 1 or (hardware.device_type == "cuda" and has_rdma()):
        links = None
    way = Way(setup, memory(subject.shape, subject.trained, setup, process_bytes + IMPORTED_LATER))
    return Forecast(
        estimate(subject, way, rates.over(links), None, seen, Workload.of(job, None, None)), subject, key, links
    )


def settle(run: Run, made: Forecast, path: Path | None = None) -> None:
    """Writes ``plan.json`` from the run's metrics, and remembers the run; a run of few steps tells nothing.

    Args:
        run: A run whose workers have ended.
        made: What was predicted of them.
        path: The calibration's file; None: the cluster's.
    """
    setup = made.estimate.setup
    told = [
        line
        for line in training_curve(run.metrics)
        if line["world_size"] == setup.workers
        and line["micro_batch_size"] == setup.micro_batch_size
        and not line.get("skipped")
    ]
    if len(told) < LEAST_STEPS:
        return
    measured = measure(told)
    write_json(run.plan, comparison(made, measured))
    seconds = made.estimate.time.seconds, measured["step_seconds"]
    need = made.estimate.way.memory
    process = need.parts.get("process", 0)
    kind = calibration.kind_of(made.subject.trained, made.subject.shape.parameters, setup)
    peaks = need.device_bytes - process, max(0.0, measured["peak_memory_bytes"] - process)
    try:
        calibration.remember(path or calibration.calibration_path(), made.key, Observation(*peaks, *seconds, kind))
    except OSError as error:  # a cache that cannot be written costs the next plan its precision, not this run
        logger.warning("the calibration cannot be written: %s", error)


def measure(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of training steps: the first, and the short last one, are left out of the times."""
    whole = max(line["rows"] for line in lines)
    counted = [line for line in lines[1:] if line["rows"] == whole] or list(lines[1:])
    return {
        "peak_memory_bytes": float(max(line["peak_memory_bytes"] for line in lines)),
        "step_seconds": statistics.median(line["step_seconds"] for line in counted),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in counted),
        "steps": len(lines),
    }


def comparison(made: Forecast, measured: Mapping[str, float]) -> dict[str, Any]:
    """``plan.json``: predicted, measured, and the error of each figure, predicted over measured less one."""
    expected = made.estimate
    figures = {
        "peak_memory_bytes": expected.device_bytes,
        "step_seconds": expected.step_seconds,
        "tokens_per_second": expected.tokens_per_second,
    }
    model = {"parameters": made.subject.shape.parameters, "trained": made.subject.trained}
    network = {"network": None if made.links is None else asdict(made.links)}
    return {
        "predicted": {
            **figures,
            "corrected_by_runs": expected.correction.runs,
            **model,
            **network,
            **expected.as_json(),
        },
        "measured": dict(measured),
        "error": {name: figure / measured[name] - 1 for name, figure in figures.items() if measured[name]},
    }

"""The planner's error: short real trainings beside what was predicted of them.

``python -m benchmarks.planner`` trains SmolLM2-135M, and a small model of its kind, for a few steps in each
configuration, under torchrun on this machine, and reads each run's ``plan.json``. The error is told as predicted from
formulas and data sheets alone, and as predicted after the other configurations were run (each is left out of its own
correction). A machine that others share is not as fast at one time as at another: before and after each run a plain
loop is timed in as many processes, and the seconds of a step are told also as they would be at the loop's usual pace.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.provenance import provenance
from benchmarks.short_runs import ROOT, torchrun
from distft.config import Job
from distft.model import materialise
from distft.model.shrink import shrink
from distft.plan.calibration import Correction, Observation, correction

JOB = ROOT / "launch" / "quickstart.yaml"


@dataclass(frozen=True)
class Configuration:
    """What is varied.

    Attributes:
        model: ``SmolLM2-135M`` or ``small``.
        stage: ZeRO's.
        workers: Ranks.
        micro_batch: Rows of a pass.
        checkpointing: Whether activations are computed again.
        tokens: Of a row.
    """

    model: str
    stage: int
    workers: int
    micro_batch: int
    checkpointing: bool
    tokens: int = 256

    @property
    def name(self) -> str:
        """Of its run."""
        again = "-again" if self.checkpointing else ""
        return f"{self.model}-zero{self.stage}-w{self.workers}-b{self.micro_batch}-t{self.tokens}{again}"


REAL = "SmolLM2-135M"
CONFIGURATIONS = (
    Configuration(REAL, 0, 1, 1, False),
    Configuration(REAL, 0, 1, 4, False),
    Configuration(REAL, 0, 1, 4, True),
    Configuration(REAL, 0, 2, 2, False),
    Configuration(REAL, 1, 2, 1, False),
    Configuration(REAL, 1, 2, 2, False),
    Configuration(REAL, 2, 2, 1, False),
    Configuration(REAL, 2, 2, 2, False),
    Configuration(REAL, 2, 2, 2, True),
    Configuration(REAL, 2, 2, 1, False, 512),
    Configuration(REAL, 3, 2, 1, False),
    Configuration(REAL, 3, 2, 2, False),
    Configuration(REAL, 3, 2, 2, True),
    Configuration(REAL, 2, 1, 2, False),
    Configuration("small", 0, 1, 4, False),
    Configuration("small", 2, 2, 4, False),
    Configuration("small", 3, 2, 4, True),
)


def make_small(to: Path) -> Path:
    """A model of SmolLM2's kind with 19 M parameters and its tokenizer; wide enough for arithmetic to count."""
    job = Job.load(JOB, [])
    folder = materialise(job.model, job.folder)
    shrink(folder, to, 1)
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4})
    config.update({"num_key_value_heads": 2, "head_dim": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(to)
    return to


LOOP = """
import sys, time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
rows = torch.arange(256).reshape(1, 256)
for _ in sys.stdin:
    passes, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < 5:
        model(input_ids=rows, labels=rows).loss.backward()
        passes += 1
    print(passes / seconds, flush=True)
"""


class Pacers:
    """Processes that tell how fast this machine is just now, by passes of a small model with a thread each.

    Args:
        model: The model's folder.
        most: How many there are.
    """

    def __init__(self, model: Path, most: int) -> None:
        command = [sys.executable, "-c", LOOP, str(model)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(most)]
        self.pace(most)  # the first passes are slower

    def pace(self, workers: int) -> float:
        """Passes a second of the slowest of some that compute at once, for which a step would wait."""
        asked = self._processes[:workers]
        for process in asked:
            print(file=process.stdin, flush=True)
        return min(float(process.stdout.readline()) for process in asked if process.stdout)

    @classmethod
    @contextmanager
    def running(cls, model: Path, most: int) -> Iterator[Pacers]:
        """Some, until the end."""
        pacers = cls(model, most)
        try:
            yield pacers
        finally:
            for process in pacers._processes:
                process.communicate()


def usual(paces: Sequence[float], workers: Sequence[int]) -> list[float]:
    """Each run's pace, over the median of those of runs with as many workers."""
    by = {many: statistics.median(p for p, w in zip(paces, workers, strict=True) if w == many) for many in set(workers)}
    return [pace / by[many] for pace, many in zip(paces, workers, strict=True)]


def train(one: Configuration, model: Path | None, steps: int, runs: Path) -> dict[str, Any]:
    """Trains for a few steps; the run's ``plan.json``."""
    settings = [
        f"zero.stage={one.stage}",
        f"cluster.workers={one.workers}",
        f"train.micro_batch_size={one.micro_batch}",
        f"train.activation_checkpointing={str(one.checkpointing).lower()}",
        f"train.steps={steps}",
        "train.batch_size=4",
        f"data.max_tokens={one.tokens}",
        "data.splits={validation: 0.0, test: 0.0}",
        "checkpoint.every=1.0",
        "track.tensorboard=false",
        *([] if model is None else [f"model.source={model}", "model.sha256=null"]),
    ]
    words = ["-m", "distft.train", str(JOB), "--name", one.name, "--runs", str(runs)]
    torchrun(Path(sys.executable), *words, *(word for each in settings for word in ("--set", each)), ranks=one.workers)
    found: dict[str, Any] = json.loads((runs / one.name / "plan.json").read_text())
    shutil.rmtree(runs / one.name)  # two checkpoints of 1.6 GB
    return found


def observation(plan: dict[str, Any]) -> Observation:
    """What a run teaches: predictions without correction, beside the measurements."""
    predicted, measured = plan["predicted"], plan["measured"]
    parts = predicted["memory"][predicted["peak_moment"]]
    process, seconds = parts["process"], predicted["seconds"]
    return Observation(
        sum(parts.values()) - process,
        measured["peak_memory_bytes"] - process,
        sum(seconds[part] for part in ("compute", "handling", "update", "waiting")),
        measured["step_seconds"],
    )


def errors(seen: Sequence[Observation], plans: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each run, of memory and of seconds: as predicted, and corrected by the others; predicted / measured - 1."""
    told = []
    for place, (one, plan) in enumerate(zip(seen, plans, strict=True)):
        learnt = correction([other for number, other in enumerate(seen) if number != place])
        process = plan["predicted"]["memory"][plan["predicted"]["peak_moment"]]["process"]
        whole = process + one.measured_bytes

        def memory(by: Correction, one: Observation = one, process: float = process, whole: float = whole) -> float:
            return by.bytes(process + one.predicted_bytes, process) / whole - 1

        told.append(
            {
                "memory": memory(Correction()),
                "memory_corrected": memory(learnt),
                "seconds": one.predicted_seconds / one.measured_seconds - 1,
                "seconds_corrected": one.predicted_seconds * learnt.seconds / one.measured_seconds - 1,
            }
        )
    return told


def main() -> None:
    """Runs every configuration and writes the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not timed")
    parser.add_argument("--only", nargs="*", help="names of configurations; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "planner.json")
    arguments = parser.parse_args()
    chosen = [one for one in CONFIGURATIONS if not arguments.only or one.name in arguments.only]
    plans, paces = [], []
    with tempfile.TemporaryDirectory() as temporary:
        small = make_small(Path(temporary) / "small")
        with Pacers.running(small, max(one.workers for one in chosen)) as pacers:
            for one in chosen:
                before = pacers.pace(one.workers)
                model = None if one.model == REAL else small
                plans.append(train(one, model, arguments.steps, Path(temporary) / "runs"))
                paces.append((before + pacers.pace(one.workers)) / 2)
                print(one.name, json.dumps(plans[-1]["error"]), f"pace {paces[-1]:.2f}", flush=True)
    seen = [observation(plan) for plan in plans]
    speeds = usual(paces, [one.workers for one in chosen])
    evenly = [replace(one, measured_seconds=one.measured_seconds * by) for one, by in zip(seen, speeds, strict=True)]
    found = [
        {**raw, **{f"{name}_at_usual_pace": paced[name] for name in ("seconds", "seconds_corrected")}}
        for raw, paced in zip(errors(seen, plans), errors(evenly, plans), strict=True)
    ]
    worst = {name: max((abs(one[name]) for one in found), default=0.0) for name in found[0]}
    results = [
        {
            **asdict(one),
            "observation": asdict(what),
            "pace": pace,
            "error": error,
            "moment": plan["predicted"]["peak_moment"],
        }
        for one, what, pace, error, plan in zip(chosen, seen, paces, found, plans, strict=True)
    ]
    document = {"provenance": provenance(), "worst": worst, "results": results}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for one, error in zip(chosen, found, strict=True):
        figures = "  ".join(f"{name} {value:+.1%}" for name, value in error.items())
        print(f"{one.name:36s} {figures}")
    print("worst", json.dumps({name: round(value, 3) for name, value in worst.items()}))


if __name__ == "__main__":
    main()

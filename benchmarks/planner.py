"""The planner's error: short real trainings beside what was predicted of them.

``python -m benchmarks.planner`` trains SmolLM2-135M, and a small model of its kind, for a few steps in each
configuration, under torchrun on this machine, and reads each run's ``plan.json``; then all of them once more. The error
is told as predicted from formulas and data sheets alone; as corrected by the other configurations (each is left out of
its own correction): what a user gets who never ran such a job here; and in the second round as corrected by the first,
where the same configuration was run: what a user gets from then on. Beside it stands what ``distft plan`` told before
each run, corrected by whatever was run on this machine until then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.provenance import provenance
from benchmarks.short_runs import ROOT, command_output, torchrun
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
        sharing: Ranks that share rows.
    """

    model: str
    stage: int
    workers: int
    micro_batch: int
    checkpointing: bool
    tokens: int = 256
    sharing: int = 1

    @property
    def name(self) -> str:
        """Of its run."""
        again = "-again" if self.checkpointing else ""
        shared = f"-s{self.sharing}" if self.sharing > 1 else ""
        return f"{self.model}-zero{self.stage}-w{self.workers}-b{self.micro_batch}-t{self.tokens}{again}{shared}"


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
    Configuration(REAL, 2, 3, 1, False, 1536),
    Configuration(REAL, 2, 3, 1, False, 1536, sharing=3),
    Configuration("small", 2, 2, 2, False, 512, sharing=2),
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


def settings(one: Configuration, model: Path | None, steps: int) -> list[str]:
    """What a configuration is on the command line."""
    chosen = [
        f"zero.stage={one.stage}",
        f"cluster.workers={one.workers}",
        f"train.micro_batch_size={one.micro_batch}",
        f"train.sequence_parallel_size={one.sharing}",
        f"train.activation_checkpointing={str(one.checkpointing).lower()}",
        f"train.steps={steps}",
        "train.batch_size=4",
        f"data.max_tokens={one.tokens}",
        "data.splits={validation: 0.0, test: 0.0}",
        "checkpoint.every=1.0",
        "track.tensorboard=false",
        *([] if model is None else [f"model.source={model}", "model.sha256=null"]),
    ]
    return [word for each in chosen for word in ("--set", each)]


def planned(one: Configuration, model: Path | None, steps: int) -> dict[str, float]:
    """What ``distft plan`` tells of a configuration."""
    python = Path(sys.executable)
    command = [str(python), "-m", "distft", "plan", str(JOB), "--json", *settings(one, model, steps)]
    told = json.loads(command_output(command, python, PYTHONPATH=str(ROOT)))
    (chosen,) = (each for each in told["plans"] if each["chosen"])
    return {"memory": chosen["device_bytes"], "seconds": chosen["step_seconds"]}


def train(one: Configuration, model: Path | None, steps: int, runs: Path) -> dict[str, Any]:
    """Trains for a few steps; the run's ``plan.json``, and what was planned before."""
    before = planned(one, model, steps)
    words = ["-m", "distft.train", str(JOB), "--name", one.name, "--runs", str(runs)]
    torchrun(Path(sys.executable), *words, *settings(one, model, steps), ranks=one.workers)
    found: dict[str, Any] = json.loads((runs / one.name / "plan.json").read_text())
    measured = {"memory": found["measured"]["peak_memory_bytes"], "seconds": found["measured"]["step_seconds"]}
    found["error_of_the_command"] = {name: before[name] / measured[name] - 1 for name in measured}
    shutil.rmtree(runs / one.name)  # two checkpoints of 1.6 GB
    return found


def observation(plan: dict[str, Any], kind: str) -> Observation:
    """What a run teaches: predictions without correction, beside the measurements."""
    predicted, measured = plan["predicted"], plan["measured"]
    parts = predicted["memory"][predicted["peak_moment"]]
    process, seconds = parts["process"], predicted["seconds"]
    return Observation(
        sum(parts.values()) - process,
        measured["peak_memory_bytes"] - process,
        sum(seconds[part] for part in ("compute", "handling", "update", "waiting")),
        measured["step_seconds"],
        kind,
    )


def error(one: Observation, process: float, by: Correction, suffix: str) -> dict[str, float]:
    """Of a run's memory and seconds, predicted over measured less one."""
    return {
        f"memory{suffix}": by.bytes(process + one.predicted_bytes, process) / (process + one.measured_bytes) - 1,
        f"seconds{suffix}": one.predicted_seconds * by.seconds / one.measured_seconds - 1,
    }


def errors(
    seen: Sequence[Observation], processes: Sequence[float], before: Sequence[Observation]
) -> list[dict[str, float]]:
    """Of each run of a round: as predicted, corrected by the others of its round, and by the rounds before."""
    found = []
    for one, process in zip(seen, processes, strict=True):
        others = [other for other in seen if other.kind != one.kind]
        of_it = error(one, process, Correction(), "") | error(one, process, correction(others, one.kind), "_by_others")
        if before:
            of_it |= error(one, process, correction(before, one.kind), "_by_rounds_before")
        found.append(of_it)
    return found


def told(
    chosen: Sequence[Configuration], plans: Sequence[dict[str, Any]], before: Sequence[Observation]
) -> list[dict[str, Any]]:
    """A round's results."""
    seen = [observation(plan, one.name) for one, plan in zip(chosen, plans, strict=True)]
    moments = [plan["predicted"]["peak_moment"] for plan in plans]
    processes = [plan["predicted"]["memory"][moment]["process"] for plan, moment in zip(plans, moments, strict=True)]
    found = [
        of_it | {f"{name}_by_command": value for name, value in plan["error_of_the_command"].items()}
        for of_it, plan in zip(errors(seen, processes, before), plans, strict=True)
    ]
    return [
        {**asdict(one), "moment": moment, "process": process, "observation": asdict(what), "error": of_it}
        for one, moment, process, what, of_it in zip(chosen, moments, processes, seen, found, strict=True)
    ]


def main() -> None:
    """Runs every configuration in each round and writes the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="of a run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of configurations; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "planner.json")
    arguments = parser.parse_args()
    chosen = [one for one in CONFIGURATIONS if not arguments.only or one.name in arguments.only]
    rounds: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        small = make_small(Path(temporary) / "small")
        for _ in range(arguments.rounds):
            plans = []
            for one in chosen:
                plans.append(
                    train(one, None if one.model == REAL else small, arguments.steps, Path(temporary) / "runs")
                )
                print(one.name, json.dumps(plans[-1]["error"] | plans[-1]["error_of_the_command"]), flush=True)
            before = [Observation(**result["observation"]) for results in rounds for result in results]
            rounds.append(told(chosen, plans, before))
            document = {"provenance": provenance(), "steps": arguments.steps, "rounds": rounds}
            arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for results in rounds:
        for result in results:
            figures = "  ".join(f"{name} {value:+.1%}" for name, value in result["error"].items())
            print(f"{result['observation']['kind']:36s} {figures}")


if __name__ == "__main__":
    main()

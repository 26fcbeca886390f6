"""What a cluster has taught: predictions beside measurements of its own runs, in a small file in its cache.

What is decided before a run never depends on it, so that a decision comes out the same again; what is predicted does.
Where runs of the same model and setup were measured, they alone tell; where none was, all do.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from distft.plan.hardware import Hardware, processor
from distft.plan.setup import Setup
from distft.runs import read_json, write_json
from distft.world import cache_folder

#: Runs that are remembered of a kind of device: the newest.
KEPT = 100

#: Counted up when predictions of the same run change, so that what was learnt of the old ones is left.
FORMULAS = 8

#: A run of a model that takes fewer bytes is not remembered: its memory is its process, its time that of starting
#: operations, and neither tells anything of models that are worth planning for.
LEAST_BYTES = 200_000_000


@dataclass(frozen=True)
class Observation:
    """A run's figures: as they were predicted without correction, and as they were measured.

    Attributes:
        predicted_bytes: Peak memory of a rank; of a CPU's without its process before the model.
        measured_bytes: The same, measured.
        predicted_seconds: Of a step.
        measured_seconds: Its median.
        kind: See :func:`kind_of`.
    """

    predicted_bytes: float
    measured_bytes: float
    predicted_seconds: float
    measured_seconds: float
    kind: str


@dataclass(frozen=True)
class Correction:
    """What predictions are multiplied with.

    Attributes:
        memory: Of what the model takes, without the process.
        seconds: Of a step.
        runs: How many runs it was learnt from; 0: it changes nothing.
    """

    memory: float = 1.0
    seconds: float = 1.0
    runs: int = 0

    def bytes(self, predicted: float, process: float) -> float:
        """A peak of memory, corrected; what the process holds before its model is not, since it does not grow."""
        return process + self.memory * (predicted - process)


def kind_of(trained: int, parameters: int, setup: Setup) -> str:
    """What runs have in common that are alike: the model's size, and all of the setup but what the texts are like."""
    facts = {"parameters": parameters, "trained": trained, **asdict(setup)}
    return " ".join(f"{name}={fact}" for name, fact in facts.items() if name not in ("attended_tokens", "fill"))


def correction(seen: Sequence[Observation], kind: str) -> Correction:
    """The medians of measured over predicted, which single odd runs do not move: of runs of this kind, else of all."""
    told = [one for one in seen if one.kind == kind] or seen
    if not told:
        return Correction()
    memory = statistics.median(one.measured_bytes / one.predicted_bytes for one in told)
    seconds = statistics.median(one.measured_seconds / one.predicted_seconds for one in told)
    return Correction(memory, seconds, len(told))


def key_of(hardware: Hardware, dtype: str) -> str:
    """What runs must have in common to teach one another: the device, the type of numbers, and the formulas."""
    return f"{processor() if hardware.device_type == 'cpu' else hardware.name}, {dtype}, formulas {FORMULAS}"


def calibration_path() -> Path:
    """The file, which all nodes of a cluster see."""
    return cache_folder() / "plan" / "calibration.json"


def read(path: Path, key: str) -> list[Observation]:
    """The runs that are remembered, oldest first; none where the file is not there or cannot be understood."""
    try:
        return [Observation(**one) for one in read_json(path).get(key, [])]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def remember(path: Path, key: str, observation: Observation) -> None:
    """Adds a run, unless its model is too small to teach anything."""
    if observation.predicted_bytes < LEAST_BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        kept = [*read(path, key), observation][-KEPT:]
        try:
            others = read_json(path)
        except (OSError, ValueError):
            others = {}
        write_json(path, {**others, key: [asdict(one) for one in kept]})

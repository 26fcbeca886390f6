"""A run's folder: its paths, and the reading and writing of the small files that rooms meet through."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distft.errors import JobError

#: Why training stops before its end: a person asks; more workers can be had; a node is about to go; a trial's turn has
#: ended, which nobody asks for.
Stop = Literal["interrupt", "resize", "preempted", "turn"]

#: Events that are not of training itself: what its trackers and libraries say beside it.
ASIDES = ("tracker", "warning")


@dataclass(frozen=True)
class StopRequest:
    """What the workers are asked to do; a file in the run's folder carries it.

    Attributes:
        reason: ``interrupt``: save and stop. ``resize``: stop at the next checkpoint. ``preempted``: save at once, go
            on, and save again and stop just before the deadline.
        deadline: Seconds since the epoch at which a node goes; ``preempted`` only.
    """

    reason: Stop
    deadline: float | None = None


@dataclass(frozen=True)
class Run:
    """The paths of one run; making one touches no disk."""

    folder: Path

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.name

    @property
    def job(self) -> Path:
        """The job file as it was read."""
        return self.folder / "job.yaml"

    @property
    def resolved(self) -> Path:
        """Every setting as run, each ``auto`` with its reason."""
        return self.folder / "resolved.json"

    @property
    def environment(self) -> Path:
        """Versions, devices, commit."""
        return self.folder / "environment.json"

    @property
    def card(self) -> Path:
        """The data card."""
        return self.folder / "data" / "card.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: training steps, validations, events."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint, unless the job names another storage."""
        return self.folder / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Scores with intervals."""
        return self.folder / "evaluation.json"

    @property
    def answers(self) -> Path:
        """Generation: the first prompts that were scored, with their references and each model's answer."""
        return self.folder / "answers.jsonl"

    @property
    def examples(self) -> Path:
        """Documents that were scored, from the worst to the best, with what the models made of them."""
        return self.folder / "examples.json"

    @property
    def report(self) -> Path:
        """The run on one page, for a browser."""
        return self.folder / "report.html"

    @property
    def export(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "export"

    @property
    def base(self) -> Path:
        """The model that training began with, as an export; made where it is served."""
        return self.folder / "base"

    @property
    def result(self) -> Path:
        """How the run ended."""
        return self.folder / "result.json"

    @property
    def logs(self) -> Path:
        """What libraries and worker processes said."""
        return self.folder / "logs"

    @property
    def stop_request(self) -> Path:
        """Present while somebody asks the workers to stop: see :meth:`asked` and :meth:`ask`."""
        return self.folder / "stop-requested"

    @property
    def search(self) -> Path:
        """What a search leaves: its trials, their table, its findings."""
        return self.folder / "search"

    @property
    def trials(self) -> Path:
        """One line a trial of the search."""
        return self.search / "trials.jsonl"

    @property
    def search_summary(self) -> Path:
        """What the search found, and what that took."""
        return self.search / "summary.json"

    @property
    def learning_curves(self) -> Path:
        """A picture: the objective of each trial over its training tokens."""
        return self.search / "learning-curves.png"

    @property
    def parallel_coordinates(self) -> Path:
        """A picture: the settings of each trial beside its objective."""
        return self.search / "parallel-coordinates.png"

    @property
    def group(self) -> Path:
        """Which group of workers this run is of now: when that was started, in seconds since the epoch."""
        return self.logs / "group.json"

    @property
    def plan(self) -> Path:
        """Memory and seconds of a step: predicted, measured, and the error."""
        return self.folder / "plan.json"

    @property
    def key(self) -> Path:
        """What checkpoints are signed with (HMAC): readable by the run's owner alone."""
        return self.folder / "key"

    @property
    def row_losses(self) -> Path:
        """The loss of every row of every step: float32, row r of 1-based step s at ``(s - 1) * batch_size + r``."""
        return self.folder / "row-losses.f32"

    def ask(self, request: StopRequest) -> None:
        """Asks the workers to stop; a later request takes the place of an earlier one."""
        write_json(self.stop_request, asdict(request))

    def asked(self) -> StopRequest | None:
        """What the workers are asked to do, or None."""
        try:
            return StopRequest(**read_json(self.stop_request))
        except FileNotFoundError:
            return None

    @classmethod
    def find(cls, name_or_path: str, runs: Path) -> Run:
        """The run called so under ``runs``, or at that path.

        Raises:
            JobError: There is no such run; the message lists those there are.
        """
        for folder in (runs / name_or_path, Path(name_or_path)):
            if (folder / "job.yaml").is_file():
                return cls(folder.resolve())
        known = sorted(path.parent.name for path in runs.glob("*/job.yaml")) if runs.is_dir() else []
        raise JobError(
            f"there is no run {name_or_path!r}",
            where=str(runs),
            fix=f"runs here: {', '.join(known)}" if known else "no run has been made here yet: distft run JOB.yaml",
        )


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The JSON document at ``path``."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one line to a ``.jsonl`` file in a single write, after whatever is whole in it.

    A process killed while writing leaves half a line; the next append starts on a fresh one, and
    :func:`read_lines` passes the half over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(f"{line}\n".encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a ``.jsonl`` file, in order; a line cut short by a kill is passed over."""
    if path.exists():
        with path.open("rb") as file:
            yield from _records(file)


def read_new_lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a ``.jsonl`` file from byte ``offset`` on, and the offset to go on from."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read().rpartition(b"\n")
    return list(_records(whole[0].splitlines())), offset + len(whole[0]) + len(whole[1])


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def training_curve(path: Path) -> list[dict[str, Any]]:
    """The ``train`` lines of ``metrics.jsonl`` by step; where a step was done again, the later stands."""
    by_step = {line["step"]: line for line in read_lines(path) if line.get("kind") == "train"}
    return [by_step[step] for step in sorted(by_step)]


def event(name: str, step: int, reason: str) -> dict[str, Any]:
    """An ``event`` line for ``metrics.jsonl``."""
    return {"kind": "event", "time": time.time(), "step": step, "event": name, "reason": reason}


def is_restart(record: dict[str, Any]) -> bool:
    """Whether a line of ``metrics.jsonl`` says that another group of workers took training up."""
    return record.get("event") in ("restart", "resize")


def update_result(run: Run, **fields: Any) -> None:
    """Brings fields of ``result.json`` up to date; the others stay."""
    before = read_json(run.result) if run.result.exists() else {"restarts": 0, "test_looks": []}
    write_json(run.result, {**before, **fields})


def decision(run: Run, key: str) -> Any:
    """What was decided for a setting of the job, ``auto`` or not: ``decision(run, "model.dtype")``."""
    return read_json(run.resolved)["decisions"][key]["value"]

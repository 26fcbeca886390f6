"""What a checkpoint is on disk: naming, reading and verifying it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.errors import CheckpointError
from distft.runs import Run, read_json

FORMAT = 1
MARKER = "COMPLETE"
FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class State:
    """How training stood when a checkpoint was written.

    Attributes:
        step: Updates made.
        world_size: Ranks that wrote it.
        zero_stage: How the state is split between them.
        dtype: Type of the weights in training.
        data_fingerprint: Of the prepared data, whose order the step is a place in.
        settings: The job's settings that the curve depends on, by dotted name.
        labels: The names of a classifier's labels in the order of their numbers.
        best_step: The validated step with the lowest loss, or None.
        best_loss: Its validation loss.
        validations_without_gain: How many validations ago that was.
    """

    step: int
    world_size: int
    zero_stage: int
    dtype: str
    data_fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    validations_without_gain: int = 0


@dataclass(frozen=True)
class FileRecord:
    """A file as its writer left it.

    Attributes:
        name: Its path within the checkpoint.
        bytes: Its size.
        sha256: Of its content, hexadecimal.
    """

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, folder: Path) -> FileRecord:
        """Reads and records a file of ``folder``."""
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; whether it is sound only :func:`verify` says."""

    folder: Path
    state: State
    files: tuple[FileRecord, ...]

    @property
    def step(self) -> int:
        """Updates made."""
        return self.state.step

    @property
    def bytes(self) -> int:
        """Bytes of all its files but COMPLETE."""
        return sum(record.bytes for record in self.files)

    def document(self) -> dict[str, Any]:
        """The content of COMPLETE."""
        return {"format": FORMAT, **asdict(self.state), "files": [asdict(record) for record in self.files]}

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Reads COMPLETE.

        Raises:
            CheckpointError: It is of another format, or not what was written.
        """
        try:
            document = read_json(folder / MARKER)
            form = document.pop("format")
            if form != FORMAT:
                raise CheckpointError(f"format {form}, and this version reads {FORMAT}", where=str(folder))
            files = tuple(FileRecord(**record) for record in document.pop("files"))
            return cls(folder, State(**document), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"damaged: {MARKER} cannot be read ({error})", where=str(folder)) from error


def checkpoints_folder(job: Job, run: Run) -> Path:
    """Where a run keeps its checkpoints: in its own folder, or in one of its name in the job's storage."""
    if job.checkpoint.storage is None:
        return run.checkpoints
    return (job.folder / job.checkpoint.storage / run.name).resolve()


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:06d}"


def step_folders(root: Path) -> list[Path]:
    """Every step's folder, complete or not, newest step first."""
    if not root.is_dir():
        return []
    steps = {path: int(match[1]) for path in root.iterdir() if (match := FOLDER.fullmatch(path.name))}
    return sorted(steps, key=lambda path: -steps[path])


def complete(root: Path) -> list[Checkpoint]:
    """The checkpoints that have a readable COMPLETE, newest step first; others do not exist."""
    found = []
    for folder in step_folders(root):
        if (folder / MARKER).is_file():
            try:
                found.append(Checkpoint.read(folder))
            except CheckpointError:
                continue
    return found


def verify(checkpoint: Checkpoint) -> None:
    """Compares every file with what its writer recorded.

    Raises:
        CheckpointError: A file is missing, or differs; it is named.
    """
    for record in checkpoint.files:
        path = checkpoint.folder / record.name
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != record.bytes:
            problem = f"has {path.stat().st_size:,} bytes instead of {record.bytes:,}"
        elif sha256(path) != record.sha256:
            problem = "has another sha256 than when it was written"
        else:
            continue
        raise CheckpointError(f"damaged: {record.name} {problem}", where=str(checkpoint.folder))


def newest_sound(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one."""
    problems: list[str] = []
    for folder in step_folders(root):
        if not (folder / MARKER).is_file():
            continue
        try:
            checkpoint = Checkpoint.read(folder)
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return checkpoint, problems
    return None, problems


def withdraw_after(root: Path, step: int) -> None:
    """Takes COMPLETE from the checkpoints after a step, which are damaged where training resumes from that step.

    They exist no longer then, so they are neither the newest nor counted; the next save removes what is left of them.
    """
    for folder in step_folders(root):
        if int(folder.name.removeprefix("step-")) > step and (folder / MARKER).is_file():
            (folder / MARKER).rename(folder / "DAMAGED")


def best(root: Path) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss; the newest where nothing was validated."""
    checkpoints = complete(root)
    if not checkpoints:
        return None
    wanted = checkpoints[0].state.best_step
    return next((checkpoint for checkpoint in checkpoints if checkpoint.step == wanted), checkpoints[0])


def sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

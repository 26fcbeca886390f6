"""What a checkpoint is: naming, reading and verifying it."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.checkpoint.signature import is_signed, signature
from distft.checkpoint.storage import FileRecord, Storage, Unsound

FORMAT = 3
MARKER = "COMPLETE"
FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class State:
    """How training stood when a checkpoint was written.

    Attributes:
        step: Updates made.
        world_size: Ranks that wrote it.
        zero_stage: How the state was split between them.
        dtype: Type of the weights in training.
        data_fingerprint: Of the prepared data, whose order the step is a place in.
        micro_batch_size: Rows per pass on one rank.
        settings: The job's settings that the curve depends on, by dotted name.
        labels: The names of a classifier's labels in the order of their numbers.
        best_step: The validated step with the lowest loss, or None.
        best_loss: Its validation loss.
        validations_without_gain: How many validations ago that was.
        skipped_steps: Steps whose update was left out.
        probe_loss: The loss of some fixed tokens with these weights, which must come out again after loading.
        versions: Of what trained, by package.
    """

    step: int
    world_size: int
    zero_stage: int
    dtype: str
    data_fingerprint: str
    micro_batch_size: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    validations_without_gain: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    probe_loss: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; whether it is sound only :func:`verify` says.

    Attributes:
        storage: Where it lies.
        state: How training stood.
        files: The ranks' shards, in the order of ranks.
    """

    storage: Storage
    state: State
    files: tuple[FileRecord, ...]

    @property
    def step(self) -> int:
        """Updates made."""
        return self.state.step

    @property
    def name(self) -> str:
        """Its folder's: ``step-000100``."""
        return step_name(self.step)

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return f"{self.storage}/{self.name}"

    @property
    def bytes(self) -> int:
        """Bytes of all its files, COMPLETE included."""
        return sum(file.bytes for file in self.files) + len(self._content("0" * 64))

    @property
    def names(self) -> list[str]:
        """Its files in the storage, COMPLETE first: deleted in this order, one half deleted is none."""
        return [f"{self.name}/{name}" for name in (MARKER, *(file.name for file in self.files))]

    @contextmanager
    def shards(self) -> Iterator[list[Path]]:
        """Local paths of its shards, in the order of ranks; those from a bucket are there within the context only.

        Raises:
            Unsound: One from a bucket is missing, or differs; it is named.
        """
        with ExitStack() as stack:
            with self.located():
                paths = stack.enter_context(self.storage.local(self.name, self.files))
            yield paths

    @contextmanager
    def located(self) -> Iterator[None]:
        """Adds to an :class:`Unsound` which checkpoint it is about."""
        try:
            yield
        except Unsound as error:
            raise Unsound(error.what, where=self.place) from error

    def content(self, key: builtins.bytes) -> builtins.bytes:
        """What COMPLETE holds."""
        return self._content(signature(self._document(), key))

    def _document(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self.state), "files": [asdict(file) for file in self.files]}

    def _content(self, signed: str) -> builtins.bytes:
        return _serialised({**self._document(), "signature": signed})

    @classmethod
    def read(cls, storage: Storage, name: str, key: builtins.bytes) -> Checkpoint:
        """Reads COMPLETE.

        Args:
            storage: Where it lies.
            name: Its folder's.
            key: The run's.

        Raises:
            FileNotFoundError: There is none.
            Unsound: It is of another format, not what was written, or not from this run.
        """
        content, where = storage.read(f"{name}/{MARKER}"), f"{storage}/{name}"
        try:
            document = json.loads(content)
            if document["format"] != FORMAT:
                raise Unsound(f"format {document['format']}, and this version reads {FORMAT}", where)
            if _serialised(document) != content:
                raise ValueError("it is not as it was written")
            if not is_signed(document, document.pop("signature"), key):
                raise Unsound(f"{MARKER} was changed, or is not of this run: its signature is wrong", where)
            del document["format"]
            files = tuple(FileRecord(**file) for file in document.pop("files"))
            found = cls(storage, State(**document), files)
        except (ValueError, KeyError, TypeError) as error:
            raise Unsound(f"damaged: {MARKER} cannot be read ({error})", where) from error
        if found.name != name:
            raise Unsound(f"it is a copy of the checkpoint of step {found.step}", where)
        return found


def step_name(step: int) -> str:
    """The folder of the checkpoint of a step."""
    return f"step-{step:06d}"


def step_names(sizes: dict[str, int]) -> list[str]:
    """Every step's folder among some files, complete or not, newest step first."""
    names = {name.split("/")[0] for name in sizes}
    steps = {name: int(match[1]) for name in names if (match := FOLDER.fullmatch(name))}
    return sorted(steps, key=lambda name: -steps[name])


def complete(storage: Storage, key: bytes, sizes: dict[str, int] | None = None) -> list[Checkpoint]:
    """The checkpoints with a good COMPLETE and files of the right sizes, newest step first; others do not exist.

    Args:
        storage: Where they lie.
        key: The run's.
        sizes: What is there, where it was asked already.
    """
    sizes, found = storage.sizes() if sizes is None else sizes, []
    for name in step_names(sizes):
        try:
            checkpoint = Checkpoint.read(storage, name, key)
        except (Unsound, FileNotFoundError):
            continue
        if all(sizes.get(f"{name}/{file.name}") == file.bytes for file in checkpoint.files):
            found.append(checkpoint)
    return found


def verify(checkpoint: Checkpoint) -> None:
    """Compares every file with what its writer recorded.

    Raises:
        Unsound: A file is missing, or differs; it is named.
    """
    with checkpoint.located():
        checkpoint.storage.verify(checkpoint.name, checkpoint.files)


def sound(storage: Storage, key: bytes) -> Iterator[Checkpoint | str]:
    """Every checkpoint, newest first: itself where it verifies, otherwise a sentence that says what is wrong with it.

    One that a killed save left unfinished does not exist: it is told of only where an older one takes its place.
    The files of one from a bucket stay on this machine until the next is asked for, so that it can be loaded.
    """
    sizes = storage.sizes()
    unfinished = []
    for name in step_names(sizes):
        if f"{name}/{MARKER}" not in sizes:
            unfinished.append(f"{storage}/{name}: it has no {MARKER}: saving it was cut short")
            continue
        yield from unfinished
        unfinished = []
        with ExitStack() as stack:
            try:
                checkpoint = Checkpoint.read(storage, name, key)
                stack.enter_context(checkpoint.shards())
                verify(checkpoint)
            except Unsound as error:
                yield str(error)
            else:
                yield checkpoint


def newest_sound(storage: Storage, key: bytes) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one."""
    problems: list[str] = []
    for found in sound(storage, key):
        if isinstance(found, Checkpoint):
            return found, problems
        problems.append(found)
    return None, problems


def withdraw_after(storage: Storage, step: int) -> None:
    """Takes COMPLETE from the checkpoints after a step, where training resumes from that step.

    They exist no longer then, so they are neither the newest nor counted; the next save removes what is left of them.
    """
    newer = [name for name in step_names(storage.sizes()) if int(name.removeprefix("step-")) > step]
    storage.delete(f"{name}/{MARKER}" for name in newer)


def best(storage: Storage, key: bytes) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss; the newest where nothing was validated."""
    checkpoints = complete(storage, key)
    if not checkpoints:
        return None
    wanted = checkpoints[0].state.best_step
    return next((checkpoint for checkpoint in checkpoints if checkpoint.step == wanted), checkpoints[0])


def _serialised(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

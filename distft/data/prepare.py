"""Preparing a job's data once: the key of its content, the cache, the lock; the same in one process and on Ray."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from distft import source
from distft.config import DataSection, Job, SourcesSection
from distft.data import store
from distft.data.build import FORMAT, Setting, finish
from distft.data.documents import Columns, Source, Unit, plan_units
from distft.data.example import Task
from distft.data.units import Report, disk_full_explained, work
from distft.errors import DataError
from distft.log import logger
from distft.world import cache_folder

Runner = Callable[[Sequence[Unit], Callable[[int, Unit], Report]], Iterable[Report]]
"""Does ``work(number, unit)`` for every unit, wherever, and yields the reports in any order."""

Progress = Callable[[int, int], None]
"""Is told the units done and the units there are."""

_TOKENIZER_FILES = {".json", ".txt", ".model", ".tiktoken"}


def one_by_one(units: Sequence[Unit], do: Callable[[int, Unit], Report]) -> Iterator[Report]:
    """Does the units in this process, one after the other."""
    for number, unit in enumerate(units):
        yield do(number, unit)


def prepared_folder(
    job: Job,
    model_folder: Path,
    make_task: Callable[[], Task],
    run: Runner = one_by_one,
    progress: Progress | None = None,
) -> Path:
    """The folder of the job's prepared data; built if it is not there, or not whole.

    Args:
        job: The job.
        model_folder: The model's Hugging Face folder; of it, the tokenizer's files are part of the key.
        make_task: Makes the task; only called where something must be built.
        run: Where the work is done; what comes out is the same bytes everywhere.
        progress: Told after each unit.

    Raises:
        DataError: The data cannot be used as it is.
        CapacityError: The disk is full.
    """
    sources = sources_of(job.data, job.folder)
    folder = cache_folder() / "prepared" / key_of(job, model_folder, sources)
    if store.fault(folder, deep=True) is None:
        return folder
    with disk_full_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            problem = store.fault(folder, deep=True)
            if problem is None:
                return folder
            if folder.exists():
                logger.warning("the prepared data in %s is damaged (%s) and is made again", folder, problem)
            building = folder.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                _build(building, job, sources, make_task(), run, progress)
                shutil.rmtree(folder, ignore_errors=True)
                building.replace(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return folder


def _build(
    building: Path, job: Job, sources: Sequence[Source], task: Task, run: Runner, progress: Progress | None
) -> None:
    splits = job.data.splits
    columns = Columns(task.columns, splits.group_by, splits.stratify_by)
    units = plan_units(sources, job.data.lines, job.data.limit)
    reports: dict[int, Report] = {}
    for report in run(units, partial(work, columns=columns, task=task, folder=building)):
        if report.error is not None:
            raise report.error
        reports[report.unit] = report
        if progress is not None:
            progress(len(reports), len(units))
    setting = Setting(
        seed=job.seed,
        shares={} if sources[0].split else {"validation": splits.validation, "test": splits.test},
        group_by=splits.group_by,
        stratify_by=splits.stratify_by,
        max_tokens=job.data.max_tokens,
        packing=job.data.packing,
    )
    finish(building, [reports[number] for number in range(len(units))], sources, units, setting)


def sources_of(section: DataSection, folder: Path) -> list[Source]:
    """The files of the data section, each once, in the order of their paths; split by split where splits are given.

    Raises:
        DataError: An address names nothing, or a file is in two splits.
    """
    given = section.source
    addresses: list[tuple[str | None, str | list[str]]]
    if isinstance(given, SourcesSection):
        addresses = [("train", given.train), ("validation", given.validation), ("test", given.test)]
    else:
        addresses = [(None, given)]
    found: dict[Path, str | None] = {}
    for split, named in addresses:
        listed = [named] if isinstance(named, str) else named
        for path in sorted({path for address in listed for path in source.files(address, folder)}):
            if path in found:
                raise DataError(
                    f"this file is in the {found[path]} split and in the {split} split",
                    where=str(path),
                    fix="give each split files of its own under data.source",
                )
            found[path] = split
    common = Path(os.path.commonpath([path.parent for path in found]))
    return [Source(path, path.relative_to(common).as_posix(), split) for path, split in found.items()]


def key_of(job: Job, model_folder: Path, sources: Sequence[Source]) -> str:
    """32 hex digits: a hash of every byte and setting that decides what is prepared, and of nothing else."""
    tokenizer = sorted(path for path in model_folder.iterdir() if path.suffix in _TOKENIZER_FILES)
    digests = store.sha256_of([*tokenizer, *(source.path for source in sources)])
    drawn = sources[0].split is None
    content: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": [[path.name, digest] for path, digest in zip(tokenizer, digests, strict=False)],
        "sources": [
            [source.name, source.split, digest]
            for source, digest in zip(sources, digests[len(tokenizer) :], strict=True)
        ],
        "task": job.task.model_dump(mode="json"),
        "data": job.data.model_dump(mode="json", exclude={"source"} if drawn else {"source", "splits"}),
        "seed": job.seed if drawn else None,
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

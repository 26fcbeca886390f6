"""Preparing a job's data once: the key of its content, the cache, the lock; the same in one process and on Ray."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from distft import source
from distft.config import DataSection, Job
from distft.config.sections import Entry
from distft.data import store
from distft.data.build import FORMAT, Setting, finish
from distft.data.documents import Columns, Source, Unit, plan_units
from distft.data.example import Task
from distft.data.units import UNITS, Report, disk_full_explained, done, tokens_path, work
from distft.errors import DataError
from distft.log import logger
from distft.world import cache_folder

Runner = Callable[[Mapping[int, Unit], Callable[[int, Unit], Report]], Iterable[Report]]
"""Does ``work(number, unit)`` for every unit, wherever, and yields the reports in any order."""

Progress = Callable[[int, int], None]
"""Is told the units done, those of an earlier call that was stopped among them, and the units there are."""

_KEPT_SECONDS = 7 * 24 * 3600
_TOKENIZER_FILES = {".json", ".txt", ".model", ".tiktoken", ".jinja"}


def one_by_one(units: Mapping[int, Unit], do: Callable[[int, Unit], Report]) -> Iterator[Report]:
    """Does the units in this process, one after the other."""
    for number, unit in units.items():
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
            _sweep(folder.parent)
            building = folder.with_suffix(".building")
            _build(building, job, sources, make_task(), run, progress)
            shutil.rmtree(folder, ignore_errors=True)
            building.replace(folder)
    return folder


def found(job: Job, model_folder: Path) -> Path | None:
    """The folder of the job's prepared data where it is there; the source must be on this machine."""
    folder = cache_folder() / "prepared" / key_of(job, model_folder, sources_of(job.data, job.folder))
    return folder if store.fault(folder, deep=False) is None else None


def _sweep(folder: Path) -> None:
    """Removes what was begun, never finished, and not gone on with for a week."""
    for building in folder.glob("*.building"):
        if time.time() - building.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(building, ignore_errors=True)


def _build(
    building: Path, job: Job, sources: Sequence[Source], task: Task, run: Runner, progress: Progress | None
) -> None:
    splits = job.data.splits
    columns = Columns(task.columns, splits.group_by, splits.stratify_by)
    plan = plan_units(sources, job.data.lines, job.data.limit)
    (building / UNITS).mkdir(parents=True, exist_ok=True)
    before = [done(number, unit, building) for number, unit in enumerate(plan)]
    reports = {report.unit: report for report in before if report is not None}
    _clear(building, reports.values())
    if reports:
        logger.info("%d of %d units of work were done before", len(reports), len(plan))
    missing = {number: unit for number, unit in enumerate(plan) if number not in reports}
    do = partial(work, columns=columns, task=task, folder=building)
    for report in run(missing, do) if missing else ():
        if report.error is not None:
            raise report.error
        reports[report.unit] = report
        if progress is not None:
            progress(len(reports), len(plan))
    setting = Setting(
        seed=job.seed,
        shares={} if sources[0].split else {"validation": splits.validation, "test": splits.test},
        group_by=splits.group_by,
        stratify_by=splits.stratify_by,
        max_tokens=job.data.max_tokens,
        packing=job.data.packing,
        labels=None if job.task.labels is None else tuple(job.task.labels),
        facts=task.facts,
    )
    try:
        finish(building, [reports[number] for number in range(len(plan))], sources, plan, setting)
    except DataError:
        shutil.rmtree(building)  # the same key comes to the same error
        raise


def _clear(building: Path, reports: Iterable[Report]) -> None:
    """Removes what a stopped call left beside its finished units: half-written files, token ids without a report."""
    finished = {tokens_path(building, report.unit, part) for report in reports for part in range(len(report.rows))}
    for path in (*building.rglob(f"*{store.PARTIAL}"), *({*building.glob("tokens-*.arrow")} - finished)):
        path.unlink()


def sources_of(section: DataSection, folder: Path) -> list[Source]:
    """The files of the data section, each once, in the order of their names; split by split where splits are given.

    Names do not depend on where the source lies: each is what differs between the files of one kind of place.

    Raises:
        DataError: An address names nothing, or a file is named twice.
    """
    found: dict[Path, tuple[source.Found, Entry]] = {}
    for entry in section.entries:
        for file in source.files(entry.address, folder):
            if file.path in found:
                raise _named_twice(file.name, found[file.path][1], entry)
            found[file.path] = (file, entry)
    names = _names([file for file, _ in found.values()])
    sources = [Source(path, names[path], entry.split, entry.weight) for path, (_, entry) in found.items()]
    splits = [entry.split for entry in section.entries]
    return sorted(sources, key=lambda one: (splits.index(one.split), PurePosixPath(one.name)))


def _named_twice(name: str, first: Entry, second: Entry) -> DataError:
    if first.split != second.split:
        what = f"this file is in the {first.split} split and in the {second.split} split"
        return DataError(what, where=name, fix="give each split files of its own under data.source")
    fix = "name each file once; {source: ..., weight: 2} uses its training rows twice"
    return DataError(f"this file is named twice, by {first.address} and by {second.address}", where=name, fix=fix)


def _names(found: Sequence[source.Found]) -> dict[Path, str]:
    """A name for each file: its place below what all files of its kind of place have in common."""
    kinds: dict[str, dict[Path, PurePosixPath]] = {}
    for file in found:
        kind, _, place = file.name.rpartition("://")
        kinds.setdefault(kind, {})[file.path] = PurePosixPath(place)
    names: dict[Path, str] = {}
    for kind, places in kinds.items():
        common = os.path.commonpath([place.parent for place in places.values()])
        prefix = f"{kind}://" if kind and len(kinds) > 1 else ""
        names |= {path: prefix + place.relative_to(common).as_posix() for path, place in places.items()}
    return names


def key_of(job: Job, model_folder: Path, sources: Sequence[Source]) -> str:
    """32 hex digits: a hash of every byte and setting that decides what is prepared, and of nothing else.

    Reads the whole source each time: about 1 GB/s a file, which a cache of digests by size and time would save at the
    price of being wrong where a file was changed within the tick of a clock.
    """
    tokenizer = sorted(path for path in model_folder.iterdir() if path.suffix in _TOKENIZER_FILES)
    digests = store.sha256_of([*tokenizer, *(source.path for source in sources)])
    drawn = sources[0].split is None
    content: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": [[path.name, digest] for path, digest in zip(tokenizer, digests, strict=False)],
        "sources": [
            [source.name, source.split, source.weight, digest]
            for source, digest in zip(sources, digests[len(tokenizer) :], strict=True)
        ],
        "task": job.task.model_dump(mode="json", exclude={"class_weights"}),
        "data": job.data.model_dump(mode="json", exclude={"source"} if drawn else {"source", "splits"}),
        "seed": job.seed if drawn or any(source.weight % 1 for source in sources) else None,
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

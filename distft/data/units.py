"""One unit of work: read, tokenised, fingerprinted, and written to files named by the unit.

A unit may be done in any process; nothing of what it writes depends on which. Its files are written whole or not at
all and its report is the last of them, so that a unit with a report is done, also after a kill. A unit that cannot be
cut in the source (a compressed file, a large row group) is written in parts, so that memory does not grow with it.
"""

from __future__ import annotations

import errno
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distft.data import documents, index, store
from distft.data.documents import Columns, Record, Unit
from distft.data.example import Task
from distft.errors import CapacityError, DataError, DistftError
from distft.runs import read_json, write_json

UNITS = "units"  # the folder of what is deleted once the data is prepared
_BATCH_LETTERS = 1 << 18
_BATCH_ROWS = 512


@dataclass(frozen=True)
class Report:
    """What a unit of work came to.

    Attributes:
        unit: Its number.
        rows: Rows read, of each part that it was written in.
        lengths: Lines or rows of each of its pieces, which the numbers of the next piece start at.
        error: Why it failed, as a value: exceptions change their class on the way through other systems.
    """

    unit: int
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    error: DistftError | None = None


@contextmanager
def disk_full_explained(folder: Path) -> Iterator[None]:
    """Turns "no space left on device" into an error with figures.

    Raises:
        CapacityError: The disk that holds ``folder`` is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        raise CapacityError(
            f"the disk is full while preparing data: {usage.free / 1e9:.2f} GB of {usage.total / 1e9:.1f} GB are free",
            where=str(folder),
            fix="free some space, or set DISTFT_CACHE to a folder on a larger disk; prepared data takes about "
            "as much as the text, and half as much again while it is made",
        ) from error


def tokens_path(folder: Path, unit: int, part: int) -> Path:
    """The token ids of a part of a unit; in the order of their names are the parts in that of the source."""
    return folder / f"tokens-{unit:05d}-{part:05d}.arrow"


def index_path(folder: Path, unit: int, part: int) -> Path:
    """The index of a part of a unit."""
    return folder / UNITS / f"index-{unit:05d}-{part:05d}.arrow"


def _report_path(folder: Path, unit: int) -> Path:
    return folder / UNITS / f"report-{unit:05d}.json"


def work(number: int, unit: Unit, columns: Columns, task: Task, folder: Path) -> Report:
    """Reads, tokenises and fingerprints one unit; writes its token file, its index and its report into ``folder``."""
    try:
        with disk_full_explained(folder):
            return _work(number, unit, columns, task, folder)
    except DistftError as error:
        return Report(number, error=error)
    except (FileNotFoundError, PermissionError) as error:
        fix = "every node must see the data's files, and DISTFT_CACHE, under the same paths"
        return Report(number, error=DataError(f"cannot be opened on {platform.node()}", str(error.filename), fix))


def done(number: int, unit: Unit, folder: Path) -> Report | None:
    """The report of a unit that was done before and whose files are all there, or None."""
    try:
        found = read_json(_report_path(folder, number))
        report = Report(number, tuple(found["rows"]), tuple(found["lengths"]))
        is_done = found["pieces"] == _pieces(unit) and found["bytes"] == _sizes(report, folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if is_done else None


def _work(number: int, unit: Unit, columns: Columns, task: Task, folder: Path) -> Report:
    records = ((place, record) for place, piece in enumerate(unit) for record in documents.read(piece, columns))
    rows: list[int] = []
    writer = index.Writer()
    for batch in _batches(records):
        if writer.is_full:
            _write(writer, folder, number, len(rows))
            rows.append(len(writer))
            writer = index.Writer()
        try:
            writer.add(batch, columns, task)
        except DataError as error:
            raise _placed(error, batch, task, unit) from error
    _write(writer, folder, number, len(rows))
    report = Report(number, (*rows, len(writer)), tuple(documents.length(piece) for piece in unit))
    told = {"pieces": _pieces(unit), "rows": report.rows, "lengths": report.lengths, "bytes": _sizes(report, folder)}
    write_json(_report_path(folder, number), told)
    return report


def _placed(error: DataError, batch: list[tuple[int, Record]], task: Task, unit: Unit) -> DataError:
    """The error with the row that the task refuses, which it does not know itself."""
    for place, record in batch:
        try:
            task.encode([] if record.is_empty else [tuple(text or "" for text in record.text)])
        except DataError as refused:
            return DataError(refused.what, documents.where(unit[place], record.row), refused.fix)
    return error


def _write(writer: index.Writer, folder: Path, unit: int, part: int) -> None:
    store.write_arrow(tokens_path(folder, unit, part), writer.tokens())
    store.write_arrow(index_path(folder, unit, part), writer.columns())


def _pieces(unit: Unit) -> list[list[int | None]]:
    return [[piece.source, piece.start, piece.stop, piece.limit] for piece in unit]


def _sizes(report: Report, folder: Path) -> list[int]:
    paths = [path(folder, report.unit, part) for part in range(len(report.rows)) for path in (tokens_path, index_path)]
    return [path.stat().st_size for path in paths]


def _batches(records: Iterator[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    """Records, each with its piece's place: enough for the tokenizer to be quick, few enough to be small."""
    batch: list[tuple[int, Record]] = []
    letters = 0
    for piece, record in records:
        batch.append((piece, record))
        letters += sum(len(text or "") for text in record.text)
        if letters >= _BATCH_LETTERS or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch

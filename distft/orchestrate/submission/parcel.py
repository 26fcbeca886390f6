"""What is sent to a cluster: one zip archive, which Ray unpacks as the job's working folder.

::

    distft/           this very package: what runs there is what is installed here
    job/              the job file and the relative files that it names, as they lie here to one another
    order.json        what is wanted of them, an :class:`Order`
    constraints.txt   the versions to install, where that is asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.markers import Marker
from packaging.requirements import Requirement

from distft.config import Job, UnusableFiles, check, relative_files
from distft.errors import CapacityError, JobError

#: The largest body that Ray's Jobs API takes, in bytes (DASHBOARD_CLIENT_MAX_SIZE in ray/_private/ray_constants.py).
LIMIT_BYTES = 100 * 2**20
#: The most files that an error names.
NAMED_FILES = 5


@dataclass(frozen=True)
class Order:
    """What is wanted of the files that are sent.

    Attributes:
        job: The job file, within ``job/``.
        run: The run's name.
        resume: Whether it goes on with the run that is there.
        settings: ``dotted.key=value``, as for ``--set``.
        runs: Where the cluster keeps runs, an absolute path; None: where its DISTFT_RUNS says.
        digest: Of all that is in ``job/``: the same files have the same.
    """

    job: str
    run: str
    resume: bool
    settings: list[str]
    runs: str | None
    digest: str


@dataclass(frozen=True)
class Parcel:
    """What is sent, before it is packed.

    Attributes:
        order: What is wanted.
        files: Each file here, by its name in the archive.
        checked: The job, without mistakes.
    """

    order: Order
    files: dict[str, Path]
    checked: Job

    @property
    def bytes(self) -> int:
        """What the files take, before they are packed."""
        return sum(path.stat().st_size for path in self.files.values())

    def pack(self, to: Path) -> None:
        """Writes the archive; the same files give the same bytes, which Ray then does not ask for again.

        Raises:
            CapacityError: It is larger than Ray takes.
        """
        with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, path in sorted(self.files.items()):
                _add(archive, name, path.read_bytes())
            _add(archive, "order.json", json.dumps(asdict(self.order)).encode())
        _refuse_large(to.stat().st_size, self.files)


def parcel(
    job: Path,
    settings: Sequence[str] = (),
    *,
    name: str | None = None,
    resume: bool = False,
    runs: str | None = None,
    constraints: Path | None = None,
) -> Parcel:
    """What is to be sent for a job; reads the job's files and tells nobody.

    Args:
        job: The job file.
        settings: What takes the place of its settings.
        name: The run's name; the job's where it is None.
        resume: Go on with that run.
        runs: Where the cluster keeps runs.
        constraints: The versions to install there; None: nothing is installed.

    Raises:
        JobError: The job file has mistakes (every one of them) or holds a secret, or ``runs`` is no absolute path.
        UnusableFiles: Files that it names by relative paths are not there. Others are the cluster's.
        CapacityError: The files are more than Ray takes.
    """
    named = [] if name is None else [f"name={json.dumps(name)}"]
    checked = Job.load(job, [*settings, *named])
    if problems := check(checked, relative_only=True):
        raise UnusableFiles(problems)
    if runs is not None and not Path(runs).is_absolute():
        fix = "name the folder as the cluster's nodes see it, from / on"
        raise JobError(f"{runs!r} is no absolute path", where="--runs", fix=fix)
    file = job.expanduser().resolve()
    travelling = [file, *relative_files(checked)]
    root = os.path.commonpath([path.parent for path in travelling])
    sent = {f"job/{path.relative_to(root).as_posix()}": path for path in travelling}
    order = Order(
        job=file.relative_to(root).as_posix(),
        run=checked.name,
        resume=resume,
        settings=list(settings),
        runs=runs,
        digest=_digest(sent),
    )
    files = {**sent, **dict(_package())}
    if constraints is not None:
        files["constraints.txt"] = constraints
    made = Parcel(order, files, checked)
    _refuse_large(made.bytes, files)
    return made


def installation(tool: Literal["uv", "pip"], constraints: Path, extras: Collection[str] = ()) -> dict[str, object]:
    """The part of Ray's runtime environment that installs what distft needs, at the versions of ``constraints.txt``.

    Source: https://docs.ray.io/en/releases-2.60.0/ray-core/handling-dependencies.html

    Args:
        tool: What installs.
        constraints: The file that is sent along, by whose content Ray is to tell environments apart.
        extras: Of distft's extras, those that the job needs.
    """
    wanted = [Requirement(line) for line in metadata.requires("distft") or ()]
    needed = [one for one in wanted if one.marker is None or any(_holds(one.marker, extra) for extra in ("", *extras))]
    requirements = [str(one).partition(";")[0].strip() for one in needed]
    digest = hashlib.sha256(constraints.read_bytes()).hexdigest()[:16]
    # Lines of a requirements file: pip fills in variables there, and nowhere else.
    pinned = ["--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt", f"# of {digest}"]
    return {tool: {"packages": [*pinned, *requirements]}}


def extras_of(job: Job) -> list[str]:
    """Distft's extras that a job cannot do without."""
    adapter, track = job.model.adapter, job.track
    needed = {
        "gpu": adapter is not None and adapter.quantize is not None,
        "mlflow": track.mlflow is not None,
        "wandb": track.wandb is not None,
    }
    return [extra for extra, so in needed.items() if so]


def _holds(marker: Marker, extra: str) -> bool:
    return bool(marker.evaluate({"extra": extra}))


def _package() -> Iterator[tuple[str, Path]]:
    root = Path(__file__).parents[2]
    for path in root.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"distft/{path.relative_to(root).as_posix()}", path


def _digest(files: dict[str, Path]) -> str:
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as stream:
            total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)  # of 1980: no clock in it
    entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


def _refuse_large(total: int, files: dict[str, Path]) -> None:
    if total <= LIMIT_BYTES:
        return
    by_size = sorted(((path.stat().st_size, name) for name, path in files.items()), reverse=True)
    largest = ", ".join(f"{name.removeprefix('job/')} {size / 2**20:,.1f} MiB" for size, name in by_size[:NAMED_FILES])
    raise CapacityError(
        f"{total / 2**20:,.1f} MiB of files would be sent, and Ray takes {LIMIT_BYTES / 2**20:.0f} MiB: {largest}",
        where="data.source, model.source",
        fix="put them where all nodes see them, and name them there: an absolute path, s3://, gs:// or hf://",
    )

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
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from distft.config import Job, UnusableFiles, check, relative_files
from distft.errors import CapacityError, JobError

#: The largest body that Ray's Jobs API takes, in bytes (DASHBOARD_CLIENT_MAX_SIZE in ray/_private/ray_constants.py).
LIMIT_BYTES = 100 * 2**20
#: The most files that an error names.
NAMED_FILES = 5

#: What looks like a secret: a password in an address, and keys of the Hugging Face hub, AWS, GitHub and OpenAI.
SECRET = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|\bhf_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}|\bsk-[\w-]{20,}"
)


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
        JobError: The job file has mistakes (every one of them), a secret stands in it, or ``runs`` is no absolute path.
        UnusableFiles: Files that it names by relative paths are not there. Others are the cluster's.
        CapacityError: The files are more than Ray takes.
    """
    named = [] if name is None else [f"name={json.dumps(name)}"]
    checked = Job.load(job, [*settings, *named])
    if problems := check(checked, relative_only=True):
        raise UnusableFiles(problems)
    _refuse_secrets(str(job), checked.text, settings)
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


def installation(tool: Literal["uv", "pip"], constraints: Path) -> dict[str, object]:
    """The part of Ray's runtime environment that installs what distft needs, at the versions of ``constraints.txt``.

    Source: https://docs.ray.io/en/releases-2.60.0/ray-core/handling-dependencies.html

    Args:
        tool: What installs.
        constraints: The file that is sent along, by whose content Ray is to tell environments apart.
    """
    requirements = [line for line in metadata.requires("distft") or () if "extra ==" not in line]
    digest = hashlib.sha256(constraints.read_bytes()).hexdigest()[:16]
    # Lines of a requirements file: pip fills in variables there, and nowhere else.
    pinned = ["--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt", f"# of {digest}"]
    return {tool: {"packages": [*pinned, *requirements]}}


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


def _refuse_secrets(name: str, text: str, settings: Sequence[str]) -> None:
    """Job file and settings are kept in the run's folder and shown by Ray: a secret in them is one no more."""
    lines = [(f"{name}:{number}", line) for number, line in enumerate(text.splitlines(), start=1)]
    settled = [(f"--set {setting.partition('=')[0]}", setting) for setting in settings]
    for where, line in (*lines, *settled):
        if SECRET.search(line):
            raise JobError(
                "this looks like a secret, and what is sent is shown to all who may use the cluster",
                where=where,
                fix="put it into the environment of the cluster's nodes (HF_TOKEN, AWS_SECRET_ACCESS_KEY ...)",
            )

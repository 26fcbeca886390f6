"""What a submitted job starts as, on a node of the cluster: it puts things in their place and becomes ``distft run``.

Called by Ray in the unpacked :mod:`~.parcel`: ``python -m distft.orchestrate.submission.driver``. It becomes that
process rather than starting it, so that Ray's signal to stop reaches it once and its exit status is the job's.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from distft.errors import CapacityError, DistftError, JobError
from distft.orchestrate.submission.parcel import Order
from distft.runs import read_json


def main() -> NoReturn:
    """Follows ``order.json`` in the current folder."""
    try:
        words = prepare(Order(**read_json(Path("order.json"))), Path("job"))
    except DistftError as error:
        sys.stderr.write(f"distft: {error}\n")
        raise SystemExit(error.exit_status) from None
    os.execv(sys.executable, [sys.executable, "-m", "distft", *words])


def prepare(order: Order, sent: Path) -> list[str]:
    """Keeps the sent files beside the runs, and says what to call distft with.

    What the run's folder names by a relative path is there for later commands too, when Ray has removed its own copy.
    Prepared rows and fetched models go beside the runs as well, where the node's environment does not say otherwise:
    all nodes must see them.

    Args:
        order: What is wanted.
        sent: The folder of the job's files.

    Returns:
        The words after ``distft``.

    Raises:
        JobError: Nobody says where runs are kept.
        CapacityError: That folder cannot be written.
    """
    runs = _runs(order)
    kept = runs / ".sent" / order.digest
    try:
        _keep(sent, kept)
    except OSError as error:
        raise CapacityError(
            f"runs cannot be kept here: {error.strerror}",
            where=str(error.filename or runs),
            fix="name a folder that all nodes see and may write: --runs, or DISTFT_RUNS in the nodes' environment",
        ) from error
    cache = os.environ.setdefault("DISTFT_CACHE", str(runs / ".cache"))
    if "HF_HOME" not in os.environ:
        os.environ.setdefault("HF_HUB_CACHE", f"{cache}/hub")
    words = ["run", str(kept / order.job), "--runs", str(runs), "--name", order.run]
    words += ["--resume"] if order.resume else []
    # Ray names the cluster to the driver by RAY_ADDRESS, which `auto` heeds.
    return words + [word for setting in (*order.settings, "cluster.address=auto") for word in ("--set", setting)]


def _runs(order: Order) -> Path:
    named = order.runs or os.environ.get("DISTFT_RUNS")
    if named is None or not Path(named).is_absolute():
        raise JobError(
            f"no place to keep the run: DISTFT_RUNS on this node is {'not set' if named is None else repr(named)}",
            where=order.run,
            fix="distft submit --runs DIR, a folder that all nodes see; or start Ray there with DISTFT_RUNS=DIR",
        )
    return Path(named)


def _keep(sent: Path, kept: Path) -> None:
    """Copies a folder whole or not at all; one that is there is the same."""
    if kept.is_dir():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".part-"))
    try:
        shutil.copytree(sent, temporary, dirs_exist_ok=True)
        temporary.chmod(0o755)
        temporary.rename(kept)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not kept.is_dir():  # else another job has sent the same meanwhile
            raise


if __name__ == "__main__":
    main()

"""What ``distft chaos`` does to a run, and the cluster of its own that it does it on.

Only what belongs to the run is touched: processes that write its logs, nodes that were started for it, files of its
checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distft.checkpoint import Folder, storage_of
from distft.config import Job
from distft.errors import CapacityError
from distft.orchestrate.cluster import workers_of
from distft.orchestrate.train.places import Place, read_places
from distft.runs import Run, read_json

#: The most nodes that are started on this machine; each is some processes that take memory.
MOST_NODES = 3

#: A file system that is filled must be small: it is filled with zeros.
SMALL_BYTES = 8 << 30


class Nodes:
    """A Ray cluster on this machine: a head without workers, and nodes that can be taken away.

    Args:
        job: Its workers fit on the nodes together.
    """

    def __init__(self, job: Job) -> None:
        from ray.cluster_utils import Cluster
        from torch.cuda import device_count

        workers, each, gpus = workers_of(job).max, dict(job.cluster.resources_per_worker), device_count()
        # All of a machine's GPUs are on one node: nodes beside it would count the same ones again.
        count = 1 if gpus else min(workers, MOST_NODES)
        slots = math.ceil(workers / count)
        cpus, _ = each.pop("CPU", 1.0), each.pop("GPU", None)
        self._arguments: dict[str, Any] = {
            "num_cpus": math.ceil(cpus * slots),
            "num_gpus": gpus,
            "resources": {name: amount * slots for name, amount in each.items()},
        }
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self._cluster.address
        self._nodes = [self._cluster.add_node(**self._arguments) for _ in range(count)]

    def take(self, draw: float) -> str:
        """Takes a node away without a word, with all that runs on it; returns what was done."""
        node = self._nodes.pop(_index(draw, self._nodes))
        self._cluster.remove_node(node, allow_graceful=False)
        return f"node {node.node_id[:8]} taken away"

    def give(self) -> None:
        """Starts another node in its place."""
        self._nodes.append(self._cluster.add_node(**self._arguments))

    def close(self) -> None:
        """Ends all nodes."""
        self._cluster.shutdown()


@contextlib.contextmanager
def own_cluster(job: Job) -> Iterator[Nodes]:
    """A cluster for one run, ended afterwards.

    Raises:
        CapacityError: Its nodes did not start.
    """
    before = os.environ.get("RAY_TMPDIR")
    # Ray notes there which cluster was started last, for others to find. Short, as paths of sockets must be.
    folder = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="dft", dir="/tmp")
    try:
        try:
            nodes = Nodes(job)
        except Exception as error:  # Ray raises nothing narrower
            raise CapacityError(
                f"Ray could not be started here: {error}", fix="try again when this machine is less busy"
            ) from error
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        del os.environ["RAY_TMPDIR"]
        os.environ |= {} if before is None else {"RAY_TMPDIR": before}
        shutil.rmtree(folder, ignore_errors=True)


def worker_of(run: Run, draw: float) -> Place | None:
    """One of the run's workers that are on this machine; None where there is none."""
    attempts = [read_json(path)["attempt"] for path in run.logs.glob("rank-*.json")]
    places = [place for place in read_places(run, max(attempts, default=0.0)) if is_worker_of(run, place)]
    return places[_index(draw, places)] if places else None


def kill(worker: Place) -> str:
    """Kills a worker (SIGKILL); returns what was done."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(worker.pid, signal.SIGKILL)
    return f"rank {worker.rank} killed (pid {worker.pid})"


def is_worker_of(run: Run, place: Place) -> bool:
    """Whether a process of this machine is that worker: it writes to its rank's log in the run's folder."""
    try:
        return Path(f"/proc/{place.pid}/fd/1").readlink() == (run.logs / f"rank-{place.rank}.log").resolve()
    except OSError:
        return False


def flip_byte(job: Job, run: Run, draws: Sequence[float]) -> str | None:
    """Changes one byte of the newest checkpoint where there is another one to go back to.

    Args:
        job: The run's job.
        run: The run.
        draws: From [0, 1): which file, which byte, which bit.

    Returns:
        What was done, None where there are not two checkpoints yet.
    """
    root = checkpoints_folder(job, run)
    complete = [] if root is None else sorted(path.parent for path in root.glob("step-*/COMPLETE"))
    if len(complete) < 2:
        return None
    files = sorted(path for path in complete[-1].rglob("*") if path.is_file())
    path = files[_index(draws[0], files)]
    place, bit = int(draws[1] * path.stat().st_size), 1 << int(draws[2] * 8)
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))
    return f"byte {place:,} of {path.relative_to(complete[-1].parent)} changed"


def checkpoints_folder(job: Job, run: Run) -> Path | None:
    """The folder of a run's checkpoints; None where they lie in a bucket."""
    storage = storage_of(job, run)
    return storage.root if isinstance(storage, Folder) else None


def why_not_fill(job: Job, run: Run) -> str | None:
    """Why the disk of the checkpoints is not to be filled, or None: others may need it, or the run's own log."""
    root = checkpoints_folder(job, run)
    if root is None:
        return "the checkpoints lie in a bucket"
    there = _existing(root)
    if there.stat().st_dev == _existing(run.folder).stat().st_dev:
        return "the checkpoints are not on a file system of their own (checkpoint.storage)"
    total = shutil.disk_usage(there).total
    if total > SMALL_BYTES:
        return f"the checkpoints' file system is larger than {SMALL_BYTES >> 30} GiB"
    return None


def fill(folder: Path) -> Path:
    """Takes every free byte of a folder's file system; deleting the file that is returned gives them back."""
    path = folder / "chaos-fills-the-disk"
    with path.open("wb", buffering=0) as file:
        size = 64 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
    return path


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _index(draw: float, of: Sequence[Any]) -> int:
    return int(draw * len(of))

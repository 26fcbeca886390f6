"""Experiment trackers: TensorBoard, MLflow, Weights & Biases. They hear of training, and never hold it up.

Each has a thread of its own and a queue before it. One that cannot be reached, fails or is slow costs training nothing:
what its queue cannot hold is left out, a failure ends it, and both are told once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from distft.config import Job
from distft.errors import JobError
from distft.runs import Run, read_json, write_json

Record = dict[str, Any]

#: Records that wait for a tracker at most, and how long the end of training waits for all trackers together.
QUEUED, CLOSING_SECONDS = 10_000, 20.0
#: What MLflow's server takes in one call.
METRICS_A_CALL, PARAMS_A_CALL, PARAM_LETTERS = 1000, 100, 500
#: How often MLflow asks again and how long it waits for one answer, unless the environment says otherwise: its own 7
#: times 120 s are longer than many a run.
MLFLOW = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
#: How long W&B may take to begin, and to hand over what is left at the end; the rest stays in the run's folder.
WANDB_SECONDS = 15.0
#: Numbers of a record that are no measurements.
NO_MEASUREMENTS = frozenset({"time", "step", "steps"})
#: The package of each tracker that is an extra of the same name.
EXTRAS = ("mlflow", "wandb")


class Tracker(Protocol):
    """Somebody's experiment tracker; called from one thread, and may be slow or raise."""

    def tell(self, records: Sequence[Record]) -> None:
        """Takes steps and validations, in order."""
        ...

    def close(self, *, ended_well: bool) -> None:
        """Training has ended."""
        ...


def refuse_absent(job: Job) -> None:
    """Makes sure that the trackers that a job names are installed.

    Raises:
        JobError: One is not.
    """
    for name in EXTRAS:
        if getattr(job.track, name) is not None and importlib.util.find_spec(name) is None:
            raise JobError(
                f"{name} is not installed here",
                where=f"track.{name}",
                fix=f"pip install 'distft[{name}]', or leave track.{name} out",
            )


def followers(job: Job, run: Run) -> list[Follower]:
    """One for each tracker that the job names, each already at work."""
    track = job.track
    starts: list[tuple[str, Callable[[], Tracker]]] = []
    if track.tensorboard:
        starts.append(("TensorBoard", lambda: TensorBoard(run)))
    if track.mlflow is not None:
        address = track.mlflow if "://" in track.mlflow else f"sqlite:///{job.folder / track.mlflow}"
        starts.append(("MLflow", lambda: MLflow(address, job, run)))
    if track.wandb is not None:
        project = track.wandb
        starts.append(("Weights & Biases", lambda: Wandb(project, job, run)))
    return [Follower(name, start) for name, start in starts]


class Follower:
    """Tells one tracker, in a thread of its own.

    Args:
        name: The tracker's, for people.
        start: Makes it; may take long, or fail.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name = name
        self._start = start
        self._queue: queue.Queue[Record | None] = queue.Queue(QUEUED)
        self._failure: str | None = None
        self._left_out = 0
        self._told = False
        self._ended_well = True
        self._thread = threading.Thread(target=self._work, name=f"distft {name}", daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """Puts a record in the queue; returns at once."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._left_out += 1

    def problem(self) -> str | None:
        """What is wrong with it, the first time that this is asked after it went wrong."""
        wrong = self._failure or (f"is too slow: {QUEUED:,} records wait" if self._left_out else None)
        if wrong is None or self._told:
            return None
        self._told = True
        return f"{self.name} {wrong}; training goes on without it"

    def close(self, *, ended_well: bool) -> None:
        """Says that no record will come any more; does not wait."""
        self._ended_well = ended_well
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def wait(self, seconds: float) -> None:
        """Waits until it has taken everything; one that takes longer is left alone."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive() and self._failure is None:
            self._failure = f"did not take everything within {CLOSING_SECONDS:.0f} s of the end"

    def _work(self) -> None:
        try:
            tracker = self._start()
            going = True
            while going:
                records = [self._queue.get(), *_waiting(self._queue)]
                going = None not in records
                tracker.tell([record for record in records if record is not None])
            tracker.close(ended_well=self._ended_well)
        except Exception as error:  # whatever it is, it is not training's
            self._failure = f"failed: {_one_line(error)}"


def _waiting(records: queue.Queue[Record | None]) -> Iterator[Record | None]:
    """What is in the queue now."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield records.get_nowait()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def close_all(following: Sequence[Follower], *, ended_well: bool) -> None:
    """Ends trackers, all within one time."""
    until = time.monotonic() + CLOSING_SECONDS
    for one in following:
        one.close(ended_well=ended_well)
    for one in following:
        one.wait(until - time.monotonic())


def measurements(record: Record) -> dict[str, float]:
    """The numbers of a record, by ``train/loss`` and the like."""
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in NO_MEASUREMENTS
    }


def settings(job: Job) -> dict[str, str]:
    """A job's settings by their dotted names, without addresses that may hold a password."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", str(value)

    return {name: value for name, value in walk(job.dump(), "") if not name.startswith("track.")}


def _known(run: Run, tracker: str) -> str | None:
    """What a tracker called this run when it was begun; None where it is new there."""
    path = _names(run)
    return read_json(path).get(tracker) if path.exists() else None


def _remember(run: Run, tracker: str, name: str) -> None:
    path = _names(run)
    write_json(path, {**(read_json(path) if path.exists() else {}), tracker: name})


def _names(run: Run) -> Path:
    return run.folder / "tracking.json"


def title(run: Run) -> str:
    """The run's name; of a trial also its search's."""
    parent = run.folder.parent
    return f"{parent.parent.parent.name}/{run.name}" if parent.name == "trials" else run.name


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: Run) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))

    def tell(self, records: Sequence[Record]) -> None:
        """See :class:`Tracker`."""
        for record in records:
            for name, value in measurements(record).items():
                self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def close(self, *, ended_well: bool) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class MLflow:
    """A run in MLflow's experiment ``distft``, or that of MLFLOW_EXPERIMENT_NAME; taken up again on resume.

    Args:
        address: A tracking server's or a database's URI.
        job: Its settings become parameters.
        run: Its name becomes the run's.
    """

    def __init__(self, address: str, job: Job, run: Run) -> None:
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(address)
        known = _known(run, "mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "distft")
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(number, run_name=title(run)).info.run_id
        _remember(run, "mlflow", self._id)
        params = [Param(key, value[:PARAM_LETTERS]) for key, value in settings(job).items()]
        for begin in range(0, len(params), PARAMS_A_CALL):
            self._client.log_batch(self._id, params=params[begin : begin + PARAMS_A_CALL])

    def tell(self, records: Sequence[Record]) -> None:
        """See :class:`Tracker`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(1000 * record["time"]), record["step"])
            for record in records
            for name, value in measurements(record).items()
        ]
        for begin in range(0, len(metrics), METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + METRICS_A_CALL])

    def close(self, *, ended_well: bool) -> None:
        """See :class:`Tracker`."""
        self._client.set_terminated(self._id, "FINISHED" if ended_well else "FAILED")


class Wandb:
    """A run of a Weights & Biases project, taken up again on resume; WANDB_MODE=offline keeps it in the run's folder.

    Args:
        project: The project's name.
        job: Its settings become the run's configuration.
        run: Its name becomes the run's.
    """

    def __init__(self, project: str, job: Job, run: Run) -> None:
        import wandb

        known = _known(run, "wandb")
        name = known or secrets.token_hex(4)
        self._run = wandb.init(
            project=project,
            name=title(run),
            id=name,
            resume="allow",
            dir=str(run.folder),
            config=settings(job),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                init_timeout=WANDB_SECONDS,
                finish_timeout=WANDB_SECONDS,  # also at the exit of the process, which would wait for days
                finish_timeout_raises=True,
            ),
        )
        # Steps are done again after a kill, which W&B's own count of steps does not take.
        self._run.define_metric("*", step_metric="step")
        if known is None:
            _remember(run, "wandb", name)

    def tell(self, records: Sequence[Record]) -> None:
        """See :class:`Tracker`."""
        for record in records:
            self._run.log({**measurements(record), "step": record["step"]})

    def close(self, *, ended_well: bool) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=0 if ended_well else 1)

"""The training stage: workers in the background, a person's eyes and Ctrl-C in the foreground."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from distft.config import Job
from distft.errors import Interrupted
from distft.orchestrate.cluster import Node, worker_resources, workers_of
from distft.orchestrate.data import Data
from distft.orchestrate.listener import Listener
from distft.runs import Run, read_lines, read_new_lines, update_result
from distft.world import cache_folder

T = TypeVar("T")


def train(job: Job, run: Run, data: Data, nodes: list[Node], listener: Listener) -> None:
    """Trains, from the newest checkpoint where there is one; the listener hears each line of the metrics.

    Raises:
        Interrupted: Somebody asked the run to stop (Ctrl-C); its checkpoint is written.
    """
    from distft.orchestrate.fit import Assignment, fit

    listener.stage("train")
    need = worker_resources(job, nodes)
    assignment = Assignment(
        job, run, data.prepared, data.model, cache_folder().resolve(), threads=max(1, int(need.get("CPU", 1)))
    )
    with _stop_on_interrupt(run, listener):
        fitting = _in_background(lambda: fit(assignment, workers_of(job), need))
        for record in _follow(run.metrics, fitting):
            listener.record(record)
        outcome = fitting.result()
    restarts = sum(record.get("event") == "restart" for record in read_lines(run.metrics))
    update_result(
        run,
        step=outcome.step,
        best_step=outcome.best_step,
        metrics=outcome.metrics,
        restarts=restarts,
        paths=_paths(run),
    )
    if outcome.interrupted:
        raise Interrupted(
            f"stopped at step {outcome.step:,}; its checkpoint is written",
            fix=f"go on with the same command and --resume --name {run.name}",
        )


def _paths(run: Run) -> dict[str, str]:
    return {
        "folder": str(run.folder),
        "metrics": str(run.metrics),
        "checkpoints": str(run.checkpoints),
        "export": str(run.export),
        "logs": str(run.logs),
    }


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Does something in a thread of its own: Ray Train takes Ctrl-C for itself where ``fit`` has the main one.

    A daemon thread, unlike an executor's: a second Ctrl-C must not wait for the workers.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _follow(path: Path, work: Future[Any]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a ``.jsonl`` file as they are written, from its present end, until ``work`` is done."""
    offset = path.stat().st_size if path.exists() else 0
    while True:
        finished = work.done()
        records, offset = read_new_lines(path, offset)
        yield from records
        if finished:
            return
        time.sleep(0.25)


@contextlib.contextmanager
def _stop_on_interrupt(run: Run, listener: Listener) -> Iterator[None]:
    """The first Ctrl-C asks the workers to checkpoint and stop; the second ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)

    def request_stop(*_: object) -> None:
        signal.signal(signal.SIGINT, previous)
        run.stop_request.touch()
        listener.note("Stopping after this step, with a checkpoint. Ctrl-C again ends at once, without one.")

    signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        run.stop_request.unlink(missing_ok=True)

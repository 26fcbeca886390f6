"""The whole way of one run: prepare, search, train, export, evaluate, report. They meet in the run's folder."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from distft.config import Job
from distft.errors import Interrupted, JobError
from distft.orchestrate.cluster import Node, check_capacity, connected, grown, joined, worker_resources, workers_of
from distft.orchestrate.data import Data, card_of, prepare
from distft.orchestrate.fit import check_fit
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.nodes.access import check_access
from distft.orchestrate.nodes.check import check_nodes
from distft.orchestrate.search.stage import search as search_stage
from distft.orchestrate.search.stage import winner
from distft.orchestrate.signals import interruptible
from distft.orchestrate.train.training import train as train_stage
from distft.runs import Run, read_json, update_result, write_json
from distft.train.folder import begin, run_folder
from distft.train.trackers import refuse_absent
from distft.world import runs_folder


def run(
    job: Job, *, runs: Path | None = None, name: str | None = None, resume: bool = False, listener: Listener = SILENT
) -> Run:
    """The whole way: prepare, search (where the job has such a section), train, export, evaluate, report.

    Args:
        job: What to run.
        runs: The folder that runs are kept in; DISTFT_RUNS or ``./runs`` where it is None.
        name: The run's name; the job's where it is None.
        resume: Go on with a run that was interrupted, from its newest checkpoint.
        listener: Who is told.

    Returns:
        The run's folder, with everything in it.

    Raises:
        DistftError: One of the tree in :mod:`distft.errors`; the run's folder keeps what was done.
    """
    from distft.orchestrate.results import evaluate_all, export
    from distft.orchestrate.writing import sample

    made = run_folder(job, runs or runs_folder(), name, resume)
    if resume and read_json(made.result)["status"] == "finished":
        listener.note(f"{made.name} is finished already")
        return made
    with _running(job, made, resume, listener) as (data, nodes):
        if job.search is not None:
            job, data = winner(job, made, data, nodes, listener)
        train_stage(job, made, data, nodes, listener)
        export(made, listener=listener)
        evaluate_all(job, made, data, nodes, listener)
        update_result(made, status="finished", sample=sample(job, made, data))
    report(made, listener)
    return made


def train(
    job: Job, *, runs: Path | None = None, name: str | None = None, resume: bool = False, listener: Listener = SILENT
) -> Run:
    """Prepares and trains; arguments, result and errors as of :func:`run`."""
    made = run_folder(job, runs or runs_folder(), name, resume)
    with _running(job, made, resume, listener) as (data, nodes):
        train_stage(job, made, data, nodes, listener)
        update_result(made, status="trained")
    report(made, listener)
    return made


def _check_quantisation(job: Job) -> None:
    adapter = job.model.adapter
    if adapter is not None and adapter.quantize is not None:
        from distft.model.nf4 import refuse_absent

        refuse_absent()


def search(
    job: Job, *, runs: Path | None = None, name: str | None = None, resume: bool = False, listener: Listener = SILENT
) -> Run:
    """Prepares and searches; arguments, result and errors as of :func:`run`."""
    if job.search is None:
        raise JobError("the job has no search section", where="search", fix="say what to vary: search.space")
    made = run_folder(job, runs or runs_folder(), name, resume)
    with _running(job, made, resume, listener) as (data, nodes):
        search_stage(job, made, data, nodes, listener)
        update_result(made, status="searched")
    report(made, listener)
    return made


def report(made: Run, listener: Listener) -> None:
    """Writes the run's page; a run whose page cannot be written is as good as any other, and a person is told."""
    listener.stage("report")
    try:
        from distft.report.page import write

        page = write(made)
    except Exception as error:
        listener.note(f"  no report: {' '.join(str(error).split()) or type(error).__name__}")
    else:
        update_result(made, paths={**read_json(made.result).get("paths", {}), "report": str(page)})


@contextlib.contextmanager
def _running(job: Job, made: Run, resume: bool, listener: Listener) -> Iterator[tuple[Data, list[Node]]]:
    """A run in progress: its data and its cluster; ``result.json`` tells how it ended, in any case."""
    began = time.monotonic()
    listener.stage("cluster")
    # Ray's start is waiting for other processes; the imports that training needs next take the same seconds.
    threading.Thread(target=importlib.import_module, args=["ray.train.torch"], daemon=True).start()
    with connected(job.cluster.address) as nodes, interruptible():
        if where := joined():
            listener.note(f"  {where}")
        nodes = grown(job, nodes, listener.note)
        check_capacity(workers_of(job), worker_resources(job, nodes), nodes)
        check_fit(job, nodes)
        heard = check_nodes(job, made, nodes, listener)
        _check_quantisation(job)
        refuse_absent(job)
        check_access(job, made)
        data = prepare(job, listener)
        if not resume:
            begin(job, made)
        if heard:
            write_json(made.environment, {**read_json(made.environment), **heard})
        write_json(made.card, card_of(data))
        update_result(made, status="running", reason=None)
        try:
            yield data, nodes
        except (Interrupted, KeyboardInterrupt) as stop:
            update_result(made, status="interrupted", reason=str(stop) or "Ctrl-C")
            raise
        except BaseException as error:
            update_result(made, status="failed", reason=str(error) or type(error).__name__)
            raise
        finally:
            spent = read_json(made.result).get("wall_seconds", 0.0)
            update_result(made, wall_seconds=round(spent + time.monotonic() - began, 3))

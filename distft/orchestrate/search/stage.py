"""The search stage: many short trainings, the best of them carried on, and what was learnt.

Each trial is a run of its own under ``search/trials``; see :mod:`.tuner` for how they share the cluster.
"""

from __future__ import annotations

import numpy as np

from distft.checkpoint import storage_of
from distft.config import Bounds, Job, SearchSection
from distft.data.store import Prepared
from distft.errors import DataError, DistftError, Interrupted, RunError
from distft.orchestrate import cluster
from distft.orchestrate.cluster import Node, check_capacity, worker_resources
from distft.orchestrate.data import Data, card_of, prepare
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.search.adopt import adopt
from distft.orchestrate.search.population import Population
from distft.orchestrate.search.setup import SearchSetup
from distft.orchestrate.search.trials import Trials
from distft.orchestrate.signals import Asked, stopping
from distft.orchestrate.train.training import Training
from distft.runs import Run, read_json, update_result, write_json
from distft.train.folder import job_of
from distft.tuning.importance import importance
from distft.tuning.labels import settings
from distft.tuning.pictures import write_pictures
from distft.tuning.rungs import even_rungs, most_tokens, rungs, whole_tokens
from distft.tuning.space import changes_data, section
from distft.tuning.summary import summary
from distft.tuning.trials import Trial, best_trial
from distft.world import cache_folder


def search(job: Job, run: Run, data: Data, nodes: list[Node], listener: Listener) -> Trial:
    """Finds settings: runs trials, or goes on with those of a search that was interrupted.

    Args:
        job: The job, with a ``search`` section.
        run: The run that the search belongs to.
        data: What it works on; training and validation rows only are read.
        nodes: The cluster's.
        listener: Who is told.

    Returns:
        The best trial.

    Raises:
        CapacityError: The cluster cannot hold one trial.
        DataError: There is no validation row to compare on.
        Interrupted: Somebody asked to stop.
        RunError: No trial succeeded.
    """
    from distft.orchestrate.search.tuner import run_trials  # Ray Tune takes a while to import

    asked_for, need = section(job), worker_resources(job, nodes)
    for workers, key in _workers(asked_for):
        check_capacity(Bounds(min=workers, max=workers), need, nodes, key)
    listener.stage("search")
    setup, trials = _made(job, run, data, need, listener)
    with stopping(listener.note) as asked:
        if trials.to_come:
            run_trials(setup, trials, asked)
        if asked_for.promote is not None:
            _promote(setup, trials, asked_for.promote.top, asked_for.promote.workers, listener, asked)
    if asked:
        raise Interrupted("stopped; its trials' checkpoints are written", fix=f"go on with --resume --name {run.name}")
    return _conclude(setup, trials)


def _made(job: Job, run: Run, data: Data, need: dict[str, float], listener: Listener) -> tuple[SearchSetup, Trials]:
    """What trials have in common, and those that there are."""
    asked_for, prepared = section(job), Prepared.open(data.prepared)
    if not len(prepared.rows("validation")):
        raise DataError("there is no validation row to compare trials on", where="data.splits.validation")
    rows, scheduler = prepared.rows("train"), asked_for.scheduler
    most = most_tokens(job, len(rows), rows.tokens(np.arange(len(rows))))
    populous = scheduler.kind == "pbt"
    levels = even_rungs(most, scheduler.grace) if populous else rungs(most, scheduler.grace, scheduler.reduction)
    begun = asked_for.trials if populous else _capacity(asked_for, need)  # at the same time, before any has ended
    free = storage_of(job, run).free_bytes()
    budget = min(job.checkpoint.budget_bytes, *([] if free is None else [free]))  # a full disk would fail every trial
    setup = SearchSetup(job, run, data, need, levels, budget // (begun + 1), cache_folder().resolve())
    kind = Population if populous else Trials
    return setup, kind(setup, lambda: _capacity(asked_for, need), most, listener)


def _workers(asked_for: SearchSection) -> list[tuple[int, str]]:
    """How many workers are needed at once, each with the key that asks for them."""
    needed = [(asked_for.workers_per_trial, "search.workers_per_trial")]
    return needed if asked_for.promote is None else [*needed, (asked_for.promote.workers, "search.promote.workers")]


def _capacity(asked_for: SearchSection, need: dict[str, float]) -> int:
    """How many trials run at the same time: what the cluster holds now, or an autoscaler can make it hold."""
    from ray._private.state import state

    workers = cluster.room(need, cluster.live_nodes())
    limits = state.get_max_resources_from_cluster_config()
    if limits is not None:
        workers = max(workers, Node("", limits).holds(need))
    holds = max(1, workers // asked_for.workers_per_trial)
    return holds if asked_for.concurrent == "auto" else min(asked_for.concurrent, holds)


def _promote(setup: SearchSetup, trials: Trials, top: int, workers: int, listener: Listener, asked: Asked) -> None:
    """Carries the best trials that were stopped early on to their end, on more workers, from their checkpoints."""
    for trial in [one for one in trials.ranked[:top] if one.status == "stopped"]:
        if asked:
            return
        listener.note(f"  trial {trial.id} goes on to its end on {workers} workers")
        job = setup.trial_job(trial.params, workers)
        training = Training(
            job,
            setup.trial_run(trial.id),
            setup.begun(trial.id, trial.params, job),
            setup.need,
            SILENT,
            asked,
            setup.rungs,
        )
        trials.take_up(trial.id)
        try:
            ended = training.run().stopped is None
        except DistftError as error:
            ended = False
            listener.note(f"  trial {trial.id} could not go on: {error}")
        for one in setup.validations(trial.id):
            trials.validated(trial.id, one.tokens, one.step, one.value)
        trials.end(trial.id, "finished" if ended else "stopped")


def _conclude(setup: SearchSetup, trials: Trials) -> Trial:
    """What the search found, written down."""
    trials.recount()
    run, asked_for = setup.run, section(setup.job)
    best = best_trial(trials.all, asked_for.objective.mode)
    if best is None:
        reasons = {trial.reason or "never validated": trial.id for trial in reversed(trials.all)}
        told = "; ".join(f"trial {name}: {reason}" for reason, name in reversed(reasons.items()))
        raise RunError(f"no trial succeeded: {told}", where=str(run.search), fix="mend what stopped them")
    write_pictures(run, asked_for, trials.all)
    constant = [trial for trial in trials.all if not trial.exploits]  # of the others, no one setting made the model
    rows = Prepared.open(setup.data.prepared).rows("train")
    every = rows.tokens(np.arange(len(rows)))
    whole = {trial.id: whole_tokens(setup.job, trial.params, len(rows), every) for trial in trials.all}
    found = summary(asked_for, trials.all, importance=importance(setup.job, constant), whole_tokens=whole)
    write_json(run.search_summary, found)
    update_result(run, search=found["best"])
    return best


def winner(job: Job, run: Run, data: Data, nodes: list[Node], listener: Listener) -> tuple[Job, Data]:
    """The job with the best settings, of which the run already has what the best trial has trained, and its data.

    Training then goes on from there on as many workers as the job wants. It begins anew where the trial's checkpoints
    are in a bucket, or had to give way to others.

    Raises:
        DistftError: See :func:`search`.
    """
    resolved = read_json(run.resolved)
    if "search" not in resolved:
        best = search(job, run, data, nodes, listener)
        listener.note(f"  trial {best.id} is the best: {settings(best.params)}")
        if not adopt(job, Run(run.search / "trials" / best.id), run) and best.exploits:
            listener.note("  its checkpoints are gone: training begins anew, with its last settings throughout")
        write_json(run.resolved, {**resolved, "search": best.params})
    found = job_of(run)
    if changes_data(read_json(run.resolved)["search"]):
        data = prepare(found, listener)
        write_json(run.card, card_of(data))
    return found, data

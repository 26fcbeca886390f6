"""Ray Tune around the trials of a search: it holds their resources, starts and ends them, and stops the poor ones.

Nothing of Tune's own state is read again: what to try next and whom to compare with follow from ``trials.jsonl``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from distft.config import SearchSection
from distft.orchestrate.search.setup import SearchSetup
from distft.orchestrate.search.trainable import INTERRUPTED, TURN_ENDED, TrialActor
from distft.orchestrate.search.trials import Trials
from distft.orchestrate.signals import Asked
from distft.orchestrate.train.fit import logged_to
from distft.runs import StopRequest
from distft.tuning.space import section
from distft.tuning.trials import Trial

#: Seconds between two times that a listener is told of the trials though nothing has changed.
TELL_SECONDS = 1.0


def run_trials(setup: SearchSetup, trials: Trials, asked: Asked) -> None:
    """Runs trials until there are no more to come, or somebody asks to stop.

    Args:
        setup: What they have in common.
        trials: Which they are.
        asked: Whether somebody asks to stop; those that run then write a checkpoint first.
    """
    search, run = section(setup.job), setup.run
    bundles = [setup.need] * search.workers_per_trial
    trainable = tune.with_parameters(TrialActor, setup=setup)
    tuner = tune.Tuner(
        tune.with_resources(trainable, PlacementGroupFactory([{}, *bundles])),
        tune_config=TuneConfig(
            search_alg=_Asker(trials),
            scheduler=scheduler_of(search, setup.rungs, trials.most_tokens, trials.ended),
            num_samples=trials.turns,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']}",
        ),
        run_config=RunConfig(
            name=f"tune-{time.time():.0f}",
            storage_path=str(run.logs / "ray"),
            verbose=0,
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # checkpoints are the trials' own
            failure_config=FailureConfig(max_failures=setup.job.cluster.max_failures),  # of a trial's actor
            callbacks=[_Ear(setup, trials, asked)],
        ),
    )
    with logged_to(run.logs / "ray-tune.log", "ray.tune"):
        tuner.fit()


@dataclass(frozen=True)
class _Past:
    """A trial of before, as a scheduler knows it."""

    trial_id: str


def scheduler_of(search: SearchSection, rungs: tuple[int, ...], most_tokens: int, past: list[Trial]) -> TrialScheduler:
    """Ray Tune's scheduler, which compares trials at equal training tokens.

    Args:
        search: The job's.
        rungs: The tokens at which trials are validated.
        most_tokens: The most tokens of any trial.
        past: Trials that have ended already, whom new ones are compared with too.
    """
    grace = rungs[0] if rungs else most_tokens
    known = {"time_attr": "tokens", "metric": "value", "mode": search.objective.mode, "grace_period": grace}
    scheduler: TrialScheduler
    if search.scheduler.kind in ("none", "pbt"):  # pbt stops none: see :mod:`.population`
        return FIFOScheduler()
    if search.scheduler.kind == "asha":
        # Trials end by themselves, a little before or after the tokens that they are expected to take.
        scheduler = ASHAScheduler(**known, max_t=2 * most_tokens, reduction_factor=search.scheduler.reduction)
    else:  # a slice that never ends: trials do not give way to one another
        scheduler = MedianStoppingRule(**known, min_time_slice=float("inf"))
    for trial in past:
        before = _Past(f"past-{trial.id}")
        scheduler.on_trial_add(None, before)
        for tokens, value in trial.values:
            scheduler.on_trial_result(None, before, {"tokens": tokens, "value": value})
    return scheduler


class _Unkept:
    """Leaves nothing in the snapshots that Tune makes of itself."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Asker(_Unkept, Searcher):  # type: ignore[misc]  # Ray's types are not read
    """Hands Tune the next trial where there is room for one."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self._trials = trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        try:
            trial = self._trials.next()
        except StopIteration:
            return str(Searcher.FINISHED)
        if trial is None:
            return None
        return {"trial": trial.id, "params": trial.params, "until": self._trials.until(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The trials hear of it from :class:`_Ear`."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "") -> None:
        """Keeps nothing."""


class _Ear(_Unkept, Callback):  # type: ignore[misc]
    """Hears from Tune how trials go."""

    def __init__(self, setup: SearchSetup, trials: Trials, asked: Asked) -> None:
        self._setup, self._trials, self._asked = setup, trials, asked
        self._told = 0.0
        self._stopped = False

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._trials.validated(trial.config["trial"], result["tokens"], result["step_number"], result["value"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name, last = trial.config["trial"], trial.last_result or {}
        status = last.get("status", "stopped")
        if status in (INTERRUPTED, TURN_ENDED):
            self._trials.leave(name, turn_ended=status == TURN_ENDED)
        else:
            self._trials.end(name, status, last.get("reason"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = str(trial.get_error() or "its process is gone").strip()
        self._trials.end(trial.config["trial"], "failed", error.splitlines()[-1])

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._asked and not self._stopped:
            self._stopped = True
            self._trials.close()
            self._setup.run.ask(StopRequest("interrupt"))
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._trials.tell()

"""The trials of population based training: they take turns, and at the end of each the poor go on from the good.

A turn goes from one rung to the next. Ray Tune sees each as a trial of its own, which holds the cluster no longer than
that. Tune's own scheduler for this, ``PopulationBasedTraining``, is not used: it takes no searcher, draws from the
process's random numbers, keeps its state in pickles, and where it does not wait for the whole population what comes of
it depends on which trial is faster. Here all follows from ``trials.jsonl``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distft.orchestrate.search.adopt import adopt
from distft.orchestrate.search.trials import Trials
from distft.runs import append_line, event
from distft.train.folder import begin
from distft.tuning.labels import score, settings
from distft.tuning.population import exploits
from distft.tuning.trials import Exploit, Params, Trial


class Population(Trials):
    """Trials that take turns; see :class:`.Trials`."""

    @property
    def turns(self) -> int:
        """How many turns are still to come, at most."""
        of_each = len(self._setup.rungs) + 1
        left = sum(of_each - trial.turns for trial in self.all if trial.status == "running")
        return left + (self.of - len(self.all)) * of_each

    def until(self, trial: Trial) -> int | None:
        """The rung at which the trial's turn ends; None where it goes on to its end."""
        return next(iter(self._setup.rungs[trial.passed :]), None)

    def _choose(self) -> Trial | None:
        """Which trial has its turn; None where those that have theirs must come to the rung first."""
        if len(self.all) < self.of:
            return self._new()
        if (ready := self._ready()) is not None or self._began:
            return ready
        waiting = [trial for trial in self.all if trial.status == "running"]
        if not waiting:
            raise StopIteration
        self._compare(waiting)
        return self._ready()

    def _ready(self) -> Trial | None:
        """A trial whose turn has not begun, or was interrupted."""
        running = (trial for trial in self.all if trial.status == "running" and trial.id not in self._began)
        return next((trial for trial in running if trial.turns == trial.passed), None)

    def _compare(self, waiting: Sequence[Trial]) -> None:
        """Lets those that wait at a rung go on, the poor of them from the good; written down at once when all is done.

        A driver that dies before does it again: the good trials have not moved.
        """
        by_id = {trial.id: dataclasses.replace(trial, passed=trial.turns) for trial in waiting}
        found = exploits(self._search, self._setup.job.seed, waiting[0].passed, waiting)
        taken = [self._exploit(by_id[name], by_id[source], params) for name, (source, params) in found.items()]
        self._keep(*by_id.values(), *taken)

    def _exploit(self, trial: Trial, source: Trial, params: Params) -> Trial:
        """A trial goes on from another one's weights; as it was, where that one has no checkpoint."""
        run, job = self._setup.trial_run(trial.id), self._setup.trial_job(params)
        if not adopt(job, self._setup.trial_run(source.id), run):
            return trial
        begin(job, run)
        value = trial.values[-1][1] if trial.values else None
        what = f"{settings(params)}, from trial {source.id} ({score(source.values[-1][1])} against {score(value)})"
        facts = {"trial": source.id, "before": source.params, "settings": params}
        append_line(run.metrics, {**event("exploit", source.steps, what), **facts})
        self._listener.note(f"  trial {trial.id} goes on with {what}")
        exploit = Exploit(source.id, source.steps, source.tokens, trial.params, value)
        return dataclasses.replace(
            trial,
            params=params,
            steps=source.steps,
            tokens=source.tokens,
            values=source.values,
            objective=source.objective,
            exploits=(*trial.exploits, exploit),
        )

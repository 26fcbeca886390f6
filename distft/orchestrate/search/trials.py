"""The trials of a search as the driver keeps them: which comes next, what was heard of each, what is written down."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from distft.checkpoint import Checkpoint, complete, signing_key, spare, storage_of
from distft.orchestrate.listener import Listener
from distft.orchestrate.search.setup import SearchSetup
from distft.runs import training_curve
from distft.tuning.progress import SearchProgress, seconds_left
from distft.tuning.space import ask, section, space_points
from distft.tuning.trials import Status, Trial, ranked, read_trials, trial_id, write_trials


class Trials:
    """The trials of a search; each change is written to ``trials.jsonl`` and told.

    Args:
        setup: What they have in common.
        capacity: How many the cluster holds at the same time.
        most_tokens: The most training tokens of any.
        listener: Who hears of them.
    """

    def __init__(self, setup: SearchSetup, capacity: Callable[[], int], most_tokens: int, listener: Listener) -> None:
        self._setup, self._search = setup, section(setup.job)
        self._capacity, self.most_tokens, self._listener = capacity, most_tokens, listener
        self._trials = {trial.id: trial for trial in read_trials(setup.run.trials)}
        self._left = [trial.id for trial in self.all if trial.status == "running"]  # by a driver that is gone
        self._began: dict[str, float] = {}  # of those that run now
        self.of = min(self._search.trials, space_points(self._search) or self._search.trials)
        self._closed = False

    @property
    def all(self) -> list[Trial]:
        """Every trial that has begun, in order."""
        return [self._trials[name] for name in sorted(self._trials, key=int)]

    @property
    def to_come(self) -> int:
        """How many are still to be run, at most."""
        return self.of - sum(trial.status != "running" for trial in self.all)

    @property
    def turns(self) -> int:
        """How often a trial is still to be taken up, at most."""
        return self.to_come

    @property
    def ended(self) -> list[Trial]:
        """Those that run no more."""
        return [trial for trial in self.all if trial.status != "running"]

    @property
    def ranked(self) -> list[Trial]:
        """Those that ended with an objective, the best first."""
        return ranked(self.ended, self._search.objective.mode)

    def close(self) -> None:
        """Begins no more trials."""
        self._closed = True

    def next(self) -> Trial | None:
        """The next trial, where there is room for one now: first those that a driver before has left half done.

        Raises:
            StopIteration: There are no more.
        """
        if self._closed:
            raise StopIteration
        if len(self._began) >= self._capacity():
            return None
        trial = self._choose()
        if trial is not None:
            self._trials[trial.id] = trial
            self.take_up(trial.id)
        return trial

    def until(self, trial: Trial) -> int | None:
        """The rung at which the trial's turn ends; None where it goes on to its end."""
        return None

    def _choose(self) -> Trial | None:
        """Which trial is next; None where others must come first."""
        if self._left:
            return dataclasses.replace(self._trials[self._left.pop(0)], values=())  # it tells them again
        return self._new()

    def _new(self) -> Trial:
        number = len(self._trials)
        params = ask(self._setup.job, number, self.all)
        if params is None:
            raise StopIteration
        return Trial(trial_id(number), params)

    def take_up(self, name: str) -> None:
        """A trial's time runs from now on, again where it ran before."""
        trial = self._trials[name]
        self._began[name] = time.monotonic() - trial.seconds
        self._keep(trial)

    def validated(self, name: str, tokens: int, step: int, value: float) -> None:
        """A trial was validated; one that was started again may tell what is known."""
        trial = self._trials[name]
        if not math.isfinite(value) or (trial.values and tokens <= trial.values[-1][0]):
            return
        values = (*trial.values, (tokens, value))
        trial = dataclasses.replace(trial, steps=max(step, trial.steps), tokens=max(tokens, trial.tokens))
        self._keep(self._timed(trial.with_values(values, self._search.objective.mode)))

    def end(self, name: str, status: Status, reason: str | None = None) -> None:
        """A trial has ended, by itself or stopped; its checkpoints are pruned together with those of the others."""
        trial = dataclasses.replace(self._trials[name], status=status, reason=reason)
        self._keep(self._counted(self._timed(trial)))
        self._began.pop(name, None)
        self._prune([name])

    def recount(self) -> None:
        """Counts what each trial has used once more: those that were stopped made a step or two until they heard."""
        for trial in self.ended:
            self._keep(self._counted(trial))
        self._prune([trial.id for trial in self.ended])

    def leave(self, name: str, *, turn_ended: bool = False) -> None:
        """A trial goes on later: its turn has ended, or it was interrupted and the search will be taken up again."""
        trial = self._timed(self._trials[name])
        self._keep(dataclasses.replace(trial, turns=trial.turns + turn_ended))
        self._began.pop(name, None)

    def tell(self) -> None:
        """Tells how the search stands."""
        trials, objective = [self._timed(trial) for trial in self.all], self._search.objective
        left = seconds_left(trials, self.of, max(1, self._capacity()), self.most_tokens)
        self._listener.trials(SearchProgress(trials, self.of, objective.metric, objective.mode, left))

    def _timed(self, trial: Trial) -> Trial:
        began = self._began.get(trial.id)
        return trial if began is None else dataclasses.replace(trial, seconds=round(time.monotonic() - began, 3))

    def _counted(self, trial: Trial) -> Trial:
        """With the steps and tokens that its log tells of."""
        curve = training_curve(self._setup.trial_run(trial.id).metrics)
        return dataclasses.replace(trial, steps=len(curve), tokens=sum(line["tokens"] for line in curve))

    def _keep(self, *trials: Trial) -> None:
        self._trials |= {trial.id: trial for trial in trials}
        write_trials(self._setup.run.trials, self.all)
        self.tell()

    def checkpoints(self, trial: Trial) -> Sequence[Checkpoint]:
        """A trial's complete checkpoints, newest first."""
        run = self._setup.trial_run(trial.id)
        if not run.job.exists():
            return []
        storage = storage_of(self._setup.trial_job(trial.params), run)
        return complete(storage, signing_key(run, storage))

    def _prune(self, changed: Sequence[str]) -> None:
        """Keeps, of the trials that ended, newest and best checkpoints of the best ones, as far as they have room.

        Args:
            changed: Trials that may have checkpoints which are not known of yet.
        """
        room, ranked = self._setup.budget_bytes, self.ranked
        for trial in [*ranked, *(one for one in self.ended if one not in ranked)]:
            if trial.checkpoint is None and trial.id not in changed:
                continue
            found = self.checkpoints(trial)
            kept = [one for one in found if one not in spare(found)] if trial in ranked else []
            if sum(one.bytes for one in kept) > room:
                kept = []
            room -= sum(one.bytes for one in kept)
            for one in found:
                if one not in kept:
                    one.storage.delete(one.names)
            self._keep(dataclasses.replace(trial, checkpoint=kept[0].place if kept else None))

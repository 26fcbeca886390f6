"""One trial of a search as Ray Tune runs it: an actor that trains in the placement group that Tune made for it.

The group holds the whole trial, so that it starts at once or waits as a whole, and ends with the group: when Tune takes
it back, whatever ran in it is gone. Ray Train's own groups within a trial, which
https://github.com/ray-project/ray/issues/54305 is about, are not made.
"""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future, wait
from typing import Any

from ray.tune import Trainable

from distft.errors import DistftError
from distft.orchestrate.asking import in_background
from distft.orchestrate.listener import SILENT
from distft.orchestrate.search.setup import SearchSetup, Validation
from distft.orchestrate.signals import Asked
from distft.orchestrate.train.fit import log_to
from distft.orchestrate.train.training import ENDING_SECONDS, LOOK_SECONDS, Training
from distft.runs import read_new_lines
from distft.train import Outcome
from distft.tuning.trials import Params, Status

#: How a trial ended that goes on later, as no status of a search says: somebody stopped it, or its turn has ended.
INTERRUPTED, TURN_ENDED = "interrupted", "turn ended"


class TrialActor(Trainable):  # type: ignore[misc]  # Ray's types are not read
    """Trains one trial after the other; each ``step`` waits for a validation, while training goes on."""

    def setup(self, config: dict[str, Any], setup: SearchSetup) -> None:
        """Takes up the first trial; see ``ray.tune.Trainable``."""
        self._setup = setup
        os.environ["DISTFT_CACHE"] = str(setup.cache)
        self._take_up(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends the trial before, and takes up another, in the same group."""
        self.cleanup()
        self._take_up(new_config)
        return True

    def cleanup(self) -> None:
        """Leaves nothing of the trial."""
        self._asked.stop = self._asked.at_once = True
        wait([self._training], ENDING_SECONDS + 2 * LOOK_SECONDS)

    def step(self) -> dict[str, Any]:
        """The next validation, or how the trial ended.

        Returns:
            ``tokens`` and ``value``, the objective, as of ``step_number``; at the end ``done`` with a ``status`` and,
            where it failed, a ``reason`` and a value that is not a number.
        """
        while True:
            if self._setup.run.stop_request.exists():
                self._asked.stop = True
            ended = self._training.done()
            self._hear()
            if self._heard and (ended or not self._heard[0].last):
                return self._result(self._heard.popleft(), ended=ended and not self._heard)
            if ended:
                return self._result(None, ended=True)
            time.sleep(LOOK_SECONDS)

    def _take_up(self, config: dict[str, Any]) -> None:
        setup, self._name = self._setup, config["trial"]
        self._run = setup.trial_run(self._name)
        log_to(self._run.logs / "trial.log")
        self._offset, self._asked = 0, Asked()
        self._heard: deque[Validation] = deque()
        self._told: list[Validation] = []
        self._training: Future[Outcome] = in_background(lambda: self._train(config["params"], config["until"]))

    def _train(self, params: Params, until: int | None) -> Outcome:
        """The trial's training, from its newest checkpoint where it has one."""
        setup = self._setup
        job = setup.trial_job(params)
        data = setup.begun(self._name, params, job)
        return Training(job, self._run, data, setup.need, SILENT, self._asked, setup.rungs, until).run()

    def _hear(self) -> None:
        """Takes in new validations."""
        records, self._offset = read_new_lines(self._run.metrics, self._offset)
        if any(record["kind"] == "validation" for record in records):
            known = {one.step for one in (*self._told, *self._heard)}
            self._heard += [one for one in self._setup.validations(self._name) if one.step not in known]

    def _result(self, heard: Validation | None, *, ended: bool) -> dict[str, Any]:
        if heard is not None:
            self._told.append(heard)
        at = self._told[-1] if self._told else Validation(0, 0, False, float("nan"))
        result = {"tokens": at.tokens, "step_number": at.step, "value": at.value}
        if not ended:
            return result
        status, reason = self._ending()
        unknown = {"value": float("nan")} if status == "failed" else {}
        return {**result, **unknown, "done": True, "status": status, "reason": reason}

    def _ending(self) -> tuple[Status | str, str | None]:
        """How the trial ended; an error that is a bug of ours is raised."""
        try:
            outcome = self._training.result()
        except DistftError as error:
            return (INTERRUPTED, None) if self._asked else ("failed", str(error))
        if outcome.stopped is None:
            return "finished", None
        return (TURN_ENDED if outcome.stopped == "turn" else INTERRUPTED), None

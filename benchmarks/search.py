"""What a search finds, what it costs, and how fast it decides.

- ``python benchmarks/search.py planted``: a task in which one learning rate is clearly best (a cycle of letters, which
  a tiny model learns in 120 steps if it neither crawls nor swings), known since every rate of a fine grid was trained
  to its end. Searches over five seeds: how far the best trial's rate is from it, and what share of the tokens was
  used that the same trials take without early stopping. Trials are trained by the reference engine in this process,
  and stopped by Ray Tune's own scheduler at the rungs where a search stops them.
- ``decisions``: what the scheduler and the sampler take for each decision, with 1,000 simulated trials.
- ``overhead``: trials of one setting over the same training alone, in turn.
- ``quickstart``: ``launch/search.yaml``, whose best trial is scored on the test split beside a training with the job's
  own settings.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from distft.config import Job  # noqa: E402
from distft.runs import Run, read_json, read_lines, training_curve, write_json  # noqa: E402
from distft.tuning.rungs import most_tokens, rungs  # noqa: E402
from distft.tuning.space import ask, trial_job  # noqa: E402
from distft.tuning.trials import Params, Trial, best_trial, read_trials, trial_id  # noqa: E402
from tests.distributed import tiny  # noqa: E402

BASELINE = ROOT / "benchmarks" / "baselines" / "search.json"

#: From far too low to far too high for the tiny model.
LOW, HIGH = 1e-4, 1.0
SEARCH: dict[str, Any] = {
    "space": {"train.learning_rate": {"log_uniform": [LOW, HIGH]}},
    "trials": 20,
    "scheduler": {"kind": "asha", "grace": 0.05, "reduction": 4},
}
TRAIN = {"steps": 120, "batch_size": 8, "learning_rate": LOW, "schedule": {"kind": "cosine", "warmup": 0.1}}


def make_cycle(path: Path, documents: int = 400) -> None:
    """Documents of 20 to 60 letters, each with four chances in five the one after it in a fixed cycle of 26."""
    draw = random.Random(3)
    cycle = list(string.ascii_lowercase)
    draw.shuffle(cycle)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            place, text = draw.randrange(len(cycle)), ""
            for _ in range(draw.choice([20, 40, 60])):
                text += cycle[place]
                place = (place + 1) % len(cycle) if draw.random() < 0.8 else draw.randrange(len(cycle))
            file.write(json.dumps({"text": text}) + "\n")


@dataclass(frozen=True)
class Known:
    """A trial as Tune's schedulers know it."""

    trial_id: str


class Bench:
    """Trains trials of the tiny job in this process, each setting once: training is deterministic."""

    def __init__(self, folder: Path) -> None:
        from distft.data.store import Prepared
        from distft.task.prepare import prepare

        tiny.make(folder)
        make_cycle(folder / "corpus.jsonl")
        self.folder = folder
        os.environ["DISTFT_CACHE"] = str(folder / "cache")
        self.job = tiny.job(folder, train=TRAIN, search=SEARCH)
        self.prepared = prepare(self.job, folder / "model")
        rows = Prepared.open(self.prepared).rows("train")
        self.most = most_tokens(self.job, len(rows), rows.tokens(np.arange(len(rows))))
        self.rungs = rungs(self.most, SEARCH["scheduler"]["grace"], SEARCH["scheduler"]["reduction"])
        self.known: dict[float, list[tuple[int, float]]] = {}

    def values(self, params: Params) -> list[tuple[int, float]]:
        """(tokens, validation loss) at each rung and at the end."""
        rate = float(params["train.learning_rate"])
        if rate not in self.known:
            self.known[rate] = self._train(trial_job(self.job, params, 1), Run(self.folder / "runs" / f"{rate!r}"))
        return self.known[rate]

    def _train(self, job: Job, run: Run) -> list[tuple[int, float]]:
        from distft.errors import NonFiniteLoss
        from distft.train import Attempt
        from distft.train.worker import work
        from distft.world import World

        with contextlib.suppress(NonFiniteLoss):
            attempt = Attempt(rungs=self.rungs)
            work(job, World(), run, self.prepared, self.folder / "model", kind="plain", attempt=attempt)
        tokens = np.cumsum([line["tokens"] for line in training_curve(run.metrics)])
        lines = [line for line in read_lines(run.metrics) if line["kind"] == "validation"]
        return [(int(tokens[line["step"] - 1]), line["loss"]) for line in lines]


def searched(bench: Bench, seed: int) -> list[Trial]:
    """A search as the driver makes it, one trial at a time."""
    from distft.orchestrate.search.tuner import scheduler_of

    job = tiny.job(bench.folder, f"seed={seed}", train=TRAIN, search=SEARCH)
    assert job.search is not None
    scheduler, trials = scheduler_of(job.search, bench.rungs, bench.most, []), []
    while (params := ask(job, len(trials), trials)) is not None:
        trial, told = Known(trial_id(len(trials))), []
        scheduler.on_trial_add(None, trial)
        values, status = bench.values(params), "finished"
        for tokens, loss in values:
            told.append((tokens, loss))
            decision = scheduler.on_trial_result(None, trial, {"tokens": tokens, "value": loss})
            if decision == "STOP" and tokens < values[-1][0]:
                status = "stopped"
                break
        if not told:
            trials.append(Trial(trial.trial_id, params, "failed"))
            continue
        made = Trial(trial.trial_id, params, status, tokens=told[-1][0])
        trials.append(made.with_values(told, "min"))
    return trials


def planted(seeds: int) -> dict[str, Any]:
    """How near to the best learning rate searches come, and at what cost."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        grid = np.geomspace(LOW, HIGH, 46)
        losses = [
            min((loss for _, loss in bench.values({"train.learning_rate": float(rate)})), default=math.inf)
            for rate in grid
        ]
        best = float(grid[int(np.argmin(losses))])
        runs = []
        for seed in range(seeds):
            trials = searched(bench, seed)
            found = best_trial(trials, "min")
            assert found is not None
            rate = float(found.params["train.learning_rate"])
            whole = sum((bench.values(trial.params) or [(bench.most, 0.0)])[-1][0] for trial in trials)
            runs.append(
                {
                    "seed": seed,
                    "found": rate,
                    "factor": max(rate / best, best / rate),
                    "loss_above_best": (found.objective or 0.0) - min(losses),
                    "tokens_share": sum(trial.tokens for trial in trials) / whole,
                    "stopped": sum(trial.status == "stopped" for trial in trials),
                }
            )
            print(json.dumps(runs[-1]), flush=True)
        curve = {f"{rate:.3g}": round(loss, 4) for rate, loss in zip(grid, losses, strict=True) if math.isfinite(loss)}
        return {"best": best, "losses": curve, "searches": runs}


def decisions(count: int = 1000) -> dict[str, float]:
    """Decisions per second with so many trials known, at ten rungs each."""
    from distft.orchestrate.search.tuner import scheduler_of

    with tempfile.TemporaryDirectory() as folder:
        job = tiny.job(Path(folder), train=TRAIN, search={**SEARCH, "trials": count + 1})
        assert job.search is not None
        levels = rungs(10**6, 0.001, 2)
        scheduler, draw = scheduler_of(job.search, levels, 10**6, []), np.random.default_rng(1)
        trials, made = [], 0
        began = time.perf_counter()
        for number in range(count):
            known = Known(trial_id(number))
            scheduler.on_trial_add(None, known)
            told = []
            for tokens in levels:
                told.append((tokens, float(draw.random())))
                made += 1
                if scheduler.on_trial_result(None, known, {"tokens": tokens, "value": told[-1][1]}) == "STOP":
                    break
            rate = float(np.exp(draw.uniform(np.log(LOW), np.log(HIGH))))
            trials.append(Trial(known.trial_id, {"train.learning_rate": rate}, "stopped").with_values(told, "min"))
        scheduling = made / (time.perf_counter() - began)
        asked = time.perf_counter()
        ask(job, count, trials)
        return {"scheduler_per_second": scheduling, "ask_seconds_after_1000_trials": time.perf_counter() - asked}


def distft(*words: str, runs: Path) -> None:
    """Runs a distft command."""
    subprocess.run([sys.executable, "-m", "distft", *words, "--runs", str(runs)], check=True)


def span(run: Run) -> tuple[float, float]:
    """When a run's first group of workers was started, and when training had ended."""
    lines = [line for line in read_lines(run.metrics) if line["kind"] == "event"]
    begun, finished = next(line for line in lines if line["event"] == "start"), lines[-1]
    return begun["time"] - begun["seconds"], finished["time"]


def overhead(repeats: int) -> dict[str, Any]:
    """Seconds of a trial with all that is between it and the next, over those of the same training alone."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny.make(folder)
        os.environ["DISTFT_CACHE"] = str(folder / "cache")
        rates = [1e-3 * (1 + number / 100) for number in range(repeats)]
        search = {
            "space": {"train.learning_rate": {"choice": rates}},
            "trials": repeats,
            "workers_per_trial": 2,
            "algorithm": "grid",
            "scheduler": {"kind": "none"},
        }
        job = tiny.job(folder, train=TRAIN, cluster={"address": "local", "workers": 2}, search=search)
        path = folder / "search.yaml"
        path.write_text(json.dumps(job.dump()))
        alone = []
        for number, rate in enumerate(rates):
            settings = ("--set", "search=null", "--set", f"train.learning_rate={rate}")
            distft("train", str(path), "--name", f"alone-{number}", *settings, runs=folder)
            began, ended = span(Run(folder / f"alone-{number}"))
            alone.append(ended - began)
        distft("search", str(path), "--name", "search", runs=folder)
        spans = [span(Run(folder / "search" / "search" / "trials" / trial_id(number))) for number in range(repeats)]
        starts = [before for before, _ in spans]
        apart = [later - sooner for sooner, later in itertools.pairwise(starts)]
        return {
            "alone_seconds": alone,
            "from_trial_to_trial_seconds": apart,
            "overhead_seconds": statistics.median(apart) - statistics.median(alone),
        }


def compared(prepared: Path, own: Run, found: Run) -> dict[str, Any]:
    """The test loss of one run's export minus another's, over the same 32 rows, documents drawn in pairs."""
    from distft import evaluation
    from distft.data.order import sampled_rows
    from distft.data.store import Prepared
    from distft.train.folder import job_of

    job, rows, scored = job_of(own), Prepared.open(prepared).rows("test"), []
    work = evaluation.units(rows, sampled_rows(len(rows), 32, job.seed), samples=32, seed=job.seed, max_new_tokens=None)
    for run in (own, found):
        subject = evaluation.Subject(run.export, prepared, "test", job.task.kind, "fp32", ("loss",), 1)
        scored.append(evaluation.merge(one for part in evaluation.score(subject, work) for one in part.scores))
    return dataclasses.asdict(evaluation.difference(*scored, ["loss"], job.seed)["loss"])


def quickstart() -> dict[str, Any]:
    """``launch/search.yaml`` whole; its first trial, with the job's own settings, is what the best is compared with."""
    from distft.model import materialise
    from distft.task.prepare import prepare

    with tempfile.TemporaryDirectory() as temporary:
        runs, job = Path(temporary), str(ROOT / "launch" / "search.yaml")
        began = time.perf_counter()
        words = (job, "--name", "search", "--set", "cluster.address=local")
        distft("search", *words, runs=runs)
        seconds = time.perf_counter() - began
        distft("run", *words, "--resume", runs=runs)
        found = Run(runs / "search")
        own = Run(found.search / "trials" / "000")
        subprocess.run([sys.executable, "-m", "distft", "export", str(own.folder)], check=True)
        loaded = Job.load(job)
        prepared = prepare(loaded, materialise(loaded.model, loaded.folder))  # from the cache
        return {
            "search_seconds": seconds,
            "trials": [{**dataclasses.asdict(trial), "checkpoint": None} for trial in read_trials(found.trials)],
            "summary": read_json(found.search_summary),
            "evaluation": read_json(found.evaluation),
            "test_loss_of_best_minus_own_settings": compared(prepared, own, found),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["planted", "decisions", "overhead", "quickstart"])
    parser.add_argument("--repeats", type=int, default=5, help="seeds, or trials")
    parser.add_argument("--out", type=Path, default=BASELINE)
    arguments = parser.parse_args()
    measured = {
        "planted": lambda: planted(arguments.repeats),
        "decisions": decisions,
        "overhead": lambda: overhead(arguments.repeats),
        "quickstart": quickstart,
    }[arguments.what]()
    known = read_json(arguments.out) if arguments.out.exists() else {}
    write_json(arguments.out, {**known, arguments.what: {"provenance": provenance(), **measured}})
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()

"""Training without Ray: under torchrun, or in one bare process.

``torchrun --nproc-per-node 2 -m distft.train JOB.yaml --name NAME --runs DIR [--resume]``
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distft import engine as engines
from distft.config import Job
from distft.data.store import Prepared
from distft.errors import DistftError, Interrupted
from distft.model import materialise
from distft.runs import Run, StopRequest, write_json
from distft.task.prepare import prepare
from distft.train.folder import begin, run_folder
from distft.train.outcome import Outcome
from distft.train.trackers import refuse_absent
from distft.train.worker import work
from distft.world import World, runs_folder

T = TypeVar("T")


def main() -> int:
    """Prepares what is not prepared, trains, and returns the exit status of the contract."""
    arguments = _parser().parse_args()
    world = World.from_environment()
    try:
        outcome = train(arguments, world)
    except DistftError as error:
        if world.is_main:
            print(f"distft: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        engines.leave()
    if outcome.stopped is not None:
        return Interrupted.exit_status
    return 0


def train(arguments: argparse.Namespace, world: World) -> Outcome:
    """The way of one rank from the job file to the end of training."""
    job = Job.load(arguments.job, arguments.set)
    refuse_absent(job)
    device = engines.device_of(world)
    engines.join(world, device)
    run = main_first(lambda: run_folder(job, arguments.runs, arguments.name, arguments.resume), world, device)
    model = main_first(lambda: materialise(job.model, job.folder), world, device)
    prepared = main_first(lambda: prepare(job, model), world, device)
    if not arguments.resume:
        main_first(lambda: begin(job, run), world, device)
    main_first(lambda: write_json(run.card, Prepared.open(prepared).card), world, device)
    _stop_on_signal(run)
    outcome = work(job, world, run, prepared, model, resume=arguments.resume)
    if world.is_main:
        run.stop_request.unlink(missing_ok=True)
    return outcome


def main_first(work: Callable[[], T], world: World, device: object) -> T:
    """Does something on rank 0; its value is returned, or its error raised, on every rank."""
    import torch

    outcome: tuple[T | None, DistftError | None] = (None, None)
    if world.is_main:
        try:
            outcome = work(), None
        except DistftError as error:
            outcome = None, error
    value, failure = engines.broadcast(outcome, torch.device(str(device)))
    if failure is not None:
        raise failure
    result: T = value
    return result


def _stop_on_signal(run: Run) -> None:
    """The first SIGINT or SIGTERM asks all ranks to checkpoint and stop; the second ends at once."""

    def ask(number: int, _frame: object) -> None:
        run.ask(StopRequest("interrupt"))
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distft.train", description=__doc__)
    parser.add_argument("job", type=Path, help="the job file")
    parser.add_argument("--name", help="the run's name; the job's by default")
    parser.add_argument("--runs", type=Path, default=runs_folder(), help="where runs are kept")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What the commands share: their arguments and options, and how each finds its job or run, shows it, and prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft.runs import Run
from distft.world import runs_folder

if TYPE_CHECKING:
    from distft.cli.view import View
    from distft.config import Job

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name under the runs folder, or its path.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one setting: --set train.learning_rate=1e-4. Repeatable."
    ),
]
Runs = Annotated[Path | None, typer.Option(metavar="DIR", help="Where runs are kept [default: DISTFT_RUNS or ./runs].")]
Name = Annotated[str | None, typer.Option(help="The run's name [default: the job's].")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run from its newest checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def load(path: Path, overrides: list[str] | None) -> Job:
    """The job, checked as far as that is possible without torch, Ray or reading the data."""
    from distft.config import Job, UnusableFiles
    from distft.config import check as check_files

    job = Job.load(path, overrides or [])
    problems = check_files(job)
    if problems:
        raise UnusableFiles(problems)
    return job


def runs_in(folder: Path | None) -> Path:
    """Where runs are kept: where ``--runs`` says, or where they are without it."""
    return folder or runs_folder()


def find(name: str, runs: Path | None) -> Run:
    """The run of a name or path."""
    return Run.find(name, runs_in(runs))


@contextmanager
def viewing() -> Iterator[View]:
    """Shows what happens, on the terminal."""
    from rich.console import Console

    from distft.cli.view import View

    with View(Console(highlight=False)) as view:
        yield view


def print_json(value: Any) -> None:
    """Prints one JSON document."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))

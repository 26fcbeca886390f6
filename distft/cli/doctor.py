"""``distft doctor``: what this machine and its cluster can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import Json, Runs, print_json, runs_in, viewing
from distft.errors import CapacityError

if TYPE_CHECKING:
    from rich.table import Table

    from distft.orchestrate.doctor import Examination

MARKS = {"fine": "[green]✓[/]", "note": "[yellow]![/]", "problem": "[red]✗[/]"}


def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="There must be a running cluster; start none.")] = False,
    address: Annotated[str | None, typer.Option(help="Its address [default: the one that Ray finds].")] = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Try what this machine and its cluster can do; each thing that is wrong comes with its fix."""
    try:
        import distft.engine  # noqa: F401 - torch, whose libraries are what most often lack
        from distft.orchestrate.doctor import examine
        from distft.orchestrate.listener import SILENT
    except (ImportError, OSError, RuntimeError) as error:  # torch's own libraries; a torchvision of another build
        raise CapacityError(
            f"what distft needs cannot be imported: {error}",
            fix="install it anew, in the versions of constraints.txt: pip install -c constraints.txt distft",
        ) from error

    wanted = address or ("auto" if cluster else None)
    with viewing() as view:
        found = examine(runs_in(runs), address=wanted, listener=SILENT if as_json else view)
    if as_json:
        print_json(found.as_json())
    else:
        from distft.cli.proofs import console

        console().print(_table(found))
    problems = [finding for finding in found.findings if finding.level == "problem"]
    if problems:
        told = map(str, problems) if as_json else []  # the table has them
        raise CapacityError("\n  ".join([f"{len(problems)} of these would stop a run", *told]))
    if not as_json:
        typer.echo("All is well.")


def _table(found: Examination) -> Table:
    """A line for each finding, and below it what to do about it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found.findings:
        text = escape(f"{finding.where}: {finding.text}" if finding.where else finding.text)
        advice = f"\n[dim]{escape(finding.fix)}[/]" if finding.fix else ""
        table.add_row(MARKS[finding.level], finding.topic, text + advice)
    return table

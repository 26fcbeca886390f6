"""``distft report``, ``runs`` and ``show``: what has been run, and what it came to."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import Json, RunName, Runs, find, print_json, runs_in
from distft.errors import JobError

if TYPE_CHECKING:
    from rich.table import Table

    from distft.report.brief import Brief
    from distft.report.facts import Facts
    from distft.report.verdict import Verdict

#: How a state looks in the list; what it says is there in words too.
STYLES = {"finished": "green", "failed": "red", "silent": "yellow", "interrupted": "yellow", "running": "cyan"}
MARKS = {"good": "✓", "note": "!", "bad": "✗"}
#: A part of the time that is shorter says nothing.
SHORT_SECONDS = 0.1
CHANGES = {True: "better", False: "worse", None: "unclear"}


def report(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="A run's name or path; several to compare.")],
    compare: Annotated[bool, typer.Option("--compare", help="One page for all of them, side by side.")] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page [default: report.html in the run; comparison.html beside the runs]."
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Write a run as one HTML page: verdict, scores, examples, curves, time, data; or compare runs."""
    found = [find(name, runs) for name in names]
    if compare:
        from distft.report.compare import write as write_comparison

        if len(found) < 2:
            raise JobError("one run alone cannot be compared", where="--compare", fix="name two runs or more")
        page = write_comparison(found, to or found[0].folder.parent / "comparison.html")
    elif len(found) > 1:
        raise JobError(f"{len(found)} runs", where="RUN", fix="compare them with --compare, or name one")
    else:
        from distft.report.page import write

        page = write(found[0], to)
    if as_json:
        from distft.report.brief import brief

        print_json({"page": str(page), "runs": [brief(run).as_json() for run in found]})
    else:
        typer.echo(page)
    if open_ and not webbrowser.open(page.as_uri()):
        raise JobError("no browser was found here", where="--open", fix=f"open {page} in yours")


def runs(runs: Runs = None, as_json: Json = False) -> None:
    """List what has been run, the newest first."""
    from distft.cli.proofs import console
    from distft.report.brief import runs_in as briefs

    folder = runs_in(runs)
    found = briefs(folder)
    if as_json:
        print_json([one.as_json() for one in found])
    elif not found:
        typer.echo(f"No run has been made in {folder} yet: distft run JOB.yaml")
    else:
        console().print(table(found))


def table(found: list[Brief]) -> Table:
    """A line for each run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from distft.report.verdict import interval, number, plain
    from distft.report.words import moment, size

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("run", "task", "state", "steps", "score on test", "against base", "begun", "disk"):
        made.add_column(title, justify="right" if title in ("steps", "disk") else "left", overflow="fold")
    for one in found:
        score = f"{plain(one.metric)} {number(one.score['value'])}" if one.metric and one.score else "-"
        change = f"{CHANGES[one.better]} {interval(one.difference)}" if one.difference else "-"
        state = one.status + (", damaged" if one.problems else "")
        made.add_row(
            Text(one.name),
            Text(one.task.replace("_", " ")),
            Text(state, STYLES.get(one.status, "")),
            f"{one.step:,}" + (f"/{one.steps:,}" if one.steps else ""),
            score,
            change,
            moment(one.began),
            size(one.bytes),
        )
    return made


def show(run: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """Show one run: how it is, what it came to, what was decided for it."""
    from distft.report.brief import brief
    from distft.report.facts import read
    from distft.report.verdict import judge

    found = find(run, runs)
    facts = read(found)
    verdict = judge(facts)
    if as_json:
        print_json(
            {
                **brief(found).as_json(),
                "finding": verdict.finding,
                "reasons": [{"level": reason.level, "text": reason.text} for reason in verdict.reasons],
                "result": facts.result,
                "evaluation": facts.scores,
                "decisions": facts.resolved.get("decisions", {}),
                "environment": facts.environment,
                "goodput": None if facts.spent is None else {"share": facts.spent.share, **facts.spent.parts},
                "files": files(found.folder),
            }
        )
        return
    from distft.cli.proofs import console

    for line in lines(brief(found), facts, verdict):
        console().print(line, markup=False, soft_wrap=True)


def files(folder: Path) -> dict[str, int]:
    """What lies in a run's folder, with its bytes, folders as a whole."""
    from distft.report.brief import sizes

    return {
        path.name + ("/" if path.is_dir() else ""): sum(sizes(path)) if path.is_dir() else path.stat().st_size
        for path in sorted(folder.iterdir())
    }


def lines(one: Brief, facts: Facts, verdict: Verdict) -> list[str]:
    """A run for a person, short."""
    from distft.cli.tables import score_lines
    from distft.report.tables import decisions
    from distft.report.words import duration, moment, size

    steps = f"{one.step:,}" + (f" of {one.steps:,}" if one.steps else "")
    told = [
        f"{one.name}: {one.task.replace('_', ' ')} with {one.model}",
        f"{one.status}, {steps} steps, begun {moment(one.began)}, {size(one.bytes)} on disk",
        "",
        verdict.title,
        f"  {verdict.finding}",
        *(f"  {MARKS[reason.level]} {reason.text}" for reason in verdict.reasons),
        *(f"  ✗ {problem}" for problem in facts.problems),
    ]
    for split in ("test", "validation"):
        found = score_lines(facts.scores, split) if facts.scores else []
        told += ["", *found] if found else []
    if facts.spent is not None and facts.spent.wall > 0:
        long = {name: seconds for name, seconds in facts.spent.parts.items() if seconds >= SHORT_SECONDS}
        parts = ", ".join(f"{name.replace('_', ' ')} {duration(seconds)}" for name, seconds in long.items())
        told += ["", f"Goodput {facts.spent.share:.1%} of {duration(facts.spent.wall)}: {parts}"]
    decided = [f"{its['key']} = {its['value']}: {its['reason']}" for its in decisions(facts)]
    told += ["", *decided] if decided else []
    held = ", ".join(f"{name} {size(count)}" for name, count in files(facts.run.folder).items() if count)
    return [*told, "", f"{facts.run.folder}", f"  {held}"]

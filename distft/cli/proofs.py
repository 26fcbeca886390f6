"""What ``audit``, ``blame``, ``verify`` and ``chaos`` found, as tables and one clear verdict for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from distft.ledger.audit import Audit, Disagreement
    from distft.ledger.blame import Blame
    from distft.ledger.goodput import Goodput
    from distft.orchestrate.proof.chaos import Report
    from distft.orchestrate.proof.verify import Proof

#: The most steps and rows that a message names.
NAMED_STEPS, NAMED_ROWS, NAMED_SOURCES = 5, 8, 3
#: Letters of a line where nobody looks at a terminal.
PLAIN_WIDTH = 120


def console() -> Console:
    """Where to print: as wide as the terminal; plain and of one width elsewhere."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def audit_table(audit: Audit) -> Table:
    """One line an epoch: how often its rows were used."""
    table = _table("epoch", "rows", "used once", "more often", "never", "left out")
    for epoch in audit.epochs:
        counts = (epoch.number, epoch.rows, epoch.once, epoch.more, epoch.never, epoch.left_out)
        table.add_row(*(f"{count:,}" for count in counts), style="" if epoch.more == epoch.never == 0 else "red")
    return table


def audit_lines(audit: Audit) -> Iterator[str]:
    """What happened on the way, and the verdict."""
    yield f"{audit.steps:,} of {audit.planned:,} steps{'' if audit.finished else '; the run is not finished'}"
    if audit.redone:
        yield f"done again after a restart: {_steps(audit.redone)}; the last line of each counts"
    for step, before, after in audit.resizes:
        yield f"from step {step:,} on: {after} workers, {before} before"
    if audit.skipped:
        yield f"left out, because the loss was not a number: {_steps(audit.skipped)}"
    if audit.losses_checked:
        yield f"compared with the losses of their rows: the losses of {audit.losses_checked:,} steps"
    if not audit.sound:
        return
    whole = [epoch for epoch in audit.epochs if epoch.rows == audit.rows]
    begun = [epoch for epoch in audit.epochs if epoch.rows < audit.rows]
    said = f"all {audit.rows:,} rows once in each of {len(whole)} whole epochs" if len(whole) > 1 else ""
    said = said or (f"all {audit.rows:,} rows once in one whole epoch" if whole else "")
    for epoch in begun:
        said += f"{', and ' if said else ''}{epoch.rows:,} of {audit.rows:,} rows once in epoch {epoch.number}"
    left_out = sum(epoch.left_out for epoch in audit.epochs)
    yield f"Sound: {said}{f', but for the {left_out:,} of steps left out' if left_out else ''}."


def audit_problem(audit: Audit) -> str:
    """What is wrong, the first steps with digests and rows."""
    found = audit.disagreements
    lines = [_disagreement(one) for one in found[:NAMED_STEPS]]
    more = len(found) - len(lines)
    wrong = sum(epoch.more + epoch.never for epoch in audit.epochs)
    head = f"{len(found):,} steps are not as planned; {wrong:,} rows were not used once in their epoch"
    return "\n".join([head, *lines, *([f"  and {more:,} more steps (--json lists them)"] if more else [])])


def _disagreement(one: Disagreement) -> str:
    rows = ", ".join(map(str, one.rows[:NAMED_ROWS])) + (", ..." if len(one.rows) > NAMED_ROWS else "")
    return (
        f"  step {one.step:,}: {one.problem}\n"
        f"    sample_digest planned {one.expected or '-'}, logged {one.recorded or '-'}\n"
        f"    planned rows: {rows or '-'}"
    )


def blame_table(blame: Blame, top: int) -> Table:
    """One line a row, worst first."""
    table = _table("row", "loss", "targets", "share")
    table.add_column("from", overflow="fold", ratio=2)
    table.add_column("begins", no_wrap=True, overflow="ellipsis", ratio=3)
    for row in blame.rows[:top]:
        sources = ", ".join(row.sources[:NAMED_SOURCES])
        more = len(row.sources) - NAMED_SOURCES
        table.add_row(
            f"{row.row:,}",
            f"{row.loss:.4f}",
            f"{row.supervised_tokens:,}",
            "-" if row.share is None else f"{row.share:.1%}",
            Text(f"{sources} and {more} more" if more > 0 else sources),
            Text(row.text),
        )
    return table


def blame_lines(blame: Blame, top: int) -> Iterator[str]:
    """What the table shows."""
    kept = ", left out: nothing was learnt from it" if blame.skipped else ""
    yield f"Step {blame.step:,}: loss {blame.loss:.4f} a token over {len(blame.rows):,} rows{kept}"
    if len(blame.rows) > top:
        yield f"The worst {top:,}; --top {len(blame.rows)} shows all"


def verify_table(proof: Proof) -> Table:
    """One line a case; errors that are too large are red, or marked where there is no colour."""
    table = _table("workers", "ZeRO", "micro-batch", "rows", "loss", "grad norm", "order", "")
    for result in proof.results:
        case = result.case
        errors = (result.loss, result.grad_norm)
        note = "" if result.killed is None else f"killed on {result.killed.workers} at ZeRO {result.killed.stage}"
        if result.same_digits is not None:
            note += ", same digits" if result.same_digits else ", OTHER DIGITS"
        table.add_row(
            str(case.workers),
            str(case.stage),
            str(case.micro_batch_size),
            "packed" if case.packing else "apart",
            *(f"{error:.1e}{'' if error <= proof.bound else ' !'}" for error in errors),
            "same" if result.same_rows else "OTHER",
            note,
            style="red" if result.problems else "",
        )
    return table


def verify_lines(proof: Proof) -> Iterator[str]:
    """What was done, and the verdict."""
    worst = max(max(result.loss, result.grad_norm) for result in proof.results)
    yield (
        f"{proof.steps} steps each, rows {proof.rows['packed']:,} packed and {proof.rows['apart']:,} apart; largest "
        f"relative error of loss and gradient norm against one process in fp64, bound {proof.bound:.0e}"
    )
    if not proof.problems:
        yield (
            f"All invariants hold: the same rows in the same order, errors up to {worst:.1e}, "
            "nothing lost or done otherwise through a kill."
        )


def chaos_table(report: Report) -> Table:
    """One line a fault: what it cost."""
    table = _table("step", "steps lost", "seconds")
    table.add_column("what was done", overflow="fold")
    for one in report.struck:
        seconds = "never" if one.seconds is None else f"{one.seconds:.1f}"
        table.add_row(f"{one.step:,}", f"{one.steps_lost:,}", seconds, Text(one.what))
    return table


def goodput_table(goodput: Goodput) -> Table:
    """One line a part of the wall time."""
    table = _table("seconds", "share")
    table.add_column("spent on")
    for name, seconds in goodput.parts.items():
        share = seconds / goodput.wall if goodput.wall else 0.0
        table.add_row(f"{seconds:.1f}", f"{share:.1%}", name.replace("_", " "))
    return table


def chaos_lines(report: Report) -> Iterator[str]:
    """What was not done, and the verdict."""
    for what in report.left_out:
        yield f"Not done: {what}"
    yield f"Goodput {report.goodput.share:.1%} of {report.goodput.wall:.0f} s; seed {report.seed}; {report.run}"
    if report.comparison is not None:
        bound = f"up to {report.comparison.bound:.0e} allowed" if report.comparison.bound else "none allowed"
        yield f"Largest relative difference from the undisturbed run: {report.comparison.difference:.1e} ({bound})"
    if not report.problems:
        yield f"Survived {len(report.struck)} faults: every row used once, in the planned order."


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    return table


def _steps(steps: Sequence[int]) -> str:
    """``12 steps (37 to 48)``."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    told = [str(first) if first == last else f"{first} to {last}" for first, last in spans[:NAMED_STEPS]]
    more = ", ..." if len(spans) > NAMED_STEPS else ""
    return f"{len(steps):,} step{'' if len(steps) == 1 else 's'} ({', '.join(told)}{more})"

"""The commands that prove something of a run or a job: ``audit``, ``blame``, ``verify`` and ``chaos``."""

from __future__ import annotations

from typing import Annotated

import typer

from distft.cli.arguments import JobFile, Json, Overrides, RunName, Runs, find, load, print_json, runs_in, viewing
from distft.errors import RunError


def audit(run: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """Prove from plan and log that every training row was used once an epoch."""
    from distft.cli.proofs import audit_lines, audit_problem, audit_table, console
    from distft.ledger.audit import audit as hold
    from distft.ledger.plan import plan_of
    from distft.train.folder import job_of

    found = find(run, runs)
    result = hold(plan_of(job_of(found), found), found)
    if as_json:
        print_json(result.as_json())
    else:
        out = console()
        out.print(audit_table(result))
        for line in audit_lines(result):
            out.print(line, markup=False)
    if not result.sound:
        raise RunError(audit_problem(result), where=found.name)


def blame(
    run: RunName,
    step: Annotated[int, typer.Option(min=1, help="The step, as metrics.jsonl counts.")],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Show the worst N rows.")] = 10,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """The rows of a step with their own losses, worst first."""
    from distft.cli.proofs import blame_lines, blame_table, console
    from distft.ledger.blame import blame as rows_of
    from distft.ledger.plan import plan_of
    from distft.model import materialise
    from distft.train.folder import job_of

    found = find(run, runs)
    job = job_of(found)
    folder = materialise(job.model, job.folder)
    result = rows_of(plan_of(job, found), found, folder, step, trust_remote_code=job.model.trust_remote_code)
    if as_json:
        value = result.as_json()
        print_json({**value, "rows": value["rows"][:top]})
        return
    out = console()
    for line in blame_lines(result, top):
        out.print(line, markup=False)
    out.print(blame_table(result, top))


def verify(job: JobFile, set_: Overrides = None, as_json: Json = False) -> None:
    """Prove on this job, made small, that workers, ZeRO stages, micro-batches and a kill change nothing."""
    from distft.cli.proofs import console, verify_lines, verify_table
    from distft.orchestrate.listener import SILENT
    from distft.orchestrate.proof.verify import verify as prove

    loaded = load(job, set_)
    with viewing() as view:
        proof = prove(loaded, SILENT if as_json else view)
    if as_json:
        print_json(proof.as_json())
    else:
        out = console()
        out.print(verify_table(proof))
        for line in verify_lines(proof):
            out.print(line, markup=False)
    if proof.problems:
        raise RunError("\n  ".join(["an invariant fails", *proof.problems]), where=str(job))


def chaos(
    job: JobFile,
    kills: Annotated[int, typer.Option(metavar="N", min=1, help="How many faults.")] = 3,
    set_: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="What the faults are drawn from [default: drawn].")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name [default: the job's with -chaos].")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Run the job undisturbed too, and compare the losses.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also on a cluster that the job names.")] = False,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Run the job while killing its workers, nodes and driver; tell what each cost and that nothing was lost."""
    from distft.cli.proofs import chaos_lines, chaos_table, console, goodput_table
    from distft.orchestrate.listener import SILENT
    from distft.orchestrate.proof.chaos import chaos as disturb

    load(job, set_)
    with viewing() as view:
        report = disturb(
            job,
            set_ or [],
            runs=runs_in(runs),
            kills=kills,
            name=name,
            seed=seed,
            reference=reference,
            yes=yes,
            listener=SILENT if as_json else view,
        )
    if as_json:
        print_json(report.as_json())
    else:
        out = console()
        out.print(chaos_table(report))
        out.print(goodput_table(report.goodput))
        for line in chaos_lines(report):
            out.print(line, markup=False)
    if report.problems:
        raise RunError("\n  ".join(["not everything survived", *report.problems]), where=report.run)

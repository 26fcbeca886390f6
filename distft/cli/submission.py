"""Handing a job to a remote cluster and looking after it there: ``submit``, ``status``, ``logs`` and ``stop``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distft.cli.arguments import JobFile, Json, Name, Overrides, print_json
from distft.errors import Interrupted, JobError, RunError

if TYPE_CHECKING:
    from distft.orchestrate.submission.jobs import Cluster, Submitted
    from distft.orchestrate.submission.parcel import Parcel

Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard, http://HOST:8265, or the end of a tunnel to it.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="What distft submit called it; distft status lists them.")]
HERE = "http://localhost:8265"
#: What the shell says of a command that it does not find.
NOT_FOUND = 127


def submit(
    job: JobFile,
    address: Address = HERE,
    set_: Overrides = None,
    name: Name = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of that name, also one that died with its cluster.")
    ] = False,
    runs: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the cluster keeps runs, a folder that all its nodes see [default: its DISTFT_RUNS].",
        ),
    ] = None,
    install: Annotated[
        Literal["uv", "pip"] | None,
        typer.Option(metavar="uv|pip", help="Install on the nodes what distft needs [default: it is there]."),
    ] = None,
    constraints: Annotated[Path, typer.Option(metavar="FILE", help="The versions that --install takes.")] = Path(
        "constraints.txt"
    ),
    wait: Annotated[bool, typer.Option("--wait", help="Show its log, and end as it ends; Ctrl-C leaves it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and tell what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Run the job on a remote Ray cluster, which goes on without this machine."""
    from distft.orchestrate.submission.parcel import parcel

    if install and not constraints.is_file():
        raise JobError(
            "there is no such file", where=str(constraints), fix="--constraints names the versions to install"
        )
    made = parcel(job, set_ or [], name=name, resume=resume, runs=runs, constraints=constraints if install else None)
    for line in parcel_lines(made):
        typer.echo(line)
    if dry_run:
        typer.echo(f"Nothing is sent to {address}.")
        return
    cluster = _connected(address)
    sent = cluster.submit(made, install)
    for line in next_lines(sent.id, cluster.url):
        typer.echo(line)
    if wait:
        _follow(cluster, sent.id)


def status(
    id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One job [default: all that distft submitted].")
    ] = None,
    address: Address = HERE,
    as_json: Json = False,
) -> None:
    """How submitted jobs are: a line for each."""
    cluster = _connected(address)
    found = cluster.jobs() if id is None else [cluster.job(id)]
    if as_json:
        listed = [{**job.as_json(), "last": last_words(cluster, job)} for job in found]
        print_json(listed if id is None else listed[0])
        return
    if not found:
        typer.echo(f"distft has submitted nothing to {cluster.url}.")
    for job in found:
        typer.echo(status_line(job, last_words(cluster, job)))


def logs(
    id: JobId,
    address: Address = HERE,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until it ends, and end as it ends; Ctrl-C leaves it.")
    ] = False,
) -> None:
    """What a submitted job says."""
    cluster = _connected(address)
    if follow:
        _follow(cluster, id)
    else:
        typer.echo(cluster.log(id), nl=False)


def stop(id: JobId, address: Address = HERE) -> None:
    """Stop a submitted job, with a checkpoint; wait until it has."""
    cluster = _connected(address)
    if not cluster.stop(id):
        typer.echo(f"{id} is {cluster.job(id).status} already.")
        return
    typer.echo(f"{id} writes a checkpoint and stops ...")
    job = cluster.wait(id)
    typer.echo(f"{id} is {job.status}. Go on: distft submit JOB --name {job.run} --resume --address {cluster.url}")


def parcel_lines(made: Parcel) -> Iterator[str]:
    """What is sent, and where its run will be."""
    order, sent = made.order, [name for name in made.files if name.startswith("job/")]
    yield (
        f"{order.job}: {len(sent) - 1} file{'' if len(sent) == 2 else 's'} beside it, and distft; "
        f"{made.bytes / 2**20:,.1f} MiB"
    )
    where = f"{order.runs.rstrip('/')}/{order.run}" if order.runs else f"{order.run}, where DISTFT_RUNS says there"
    yield f"The run on the cluster: {where}{', gone on with' if order.resume else ''}"
    if not order.runs:
        yield "  (that must be a folder that all nodes see; --runs DIR names another)"


def next_lines(id: str, url: str) -> Iterator[str]:
    """What can be done with a job that is under way."""
    yield f"Submitted as {id}. It goes on without this machine."
    yield f"  distft logs {id} --follow --address {url}"
    yield f"  distft status {id} --address {url}"
    yield f"  distft stop {id} --address {url}"


def status_line(job: Submitted, last: str) -> str:
    """A job for a person: id, status, run, for how long, its last words."""
    from distft.report.words import duration

    spent = duration((job.ended or time.time()) - job.began)
    ended = f" (exit status {job.exit_status})" if job.exit_status else ""
    return f"{job.id}  {job.status}{ended}  {spent}{f'  {last}' if last else ''}"


def last_words(cluster: Cluster, job: Submitted) -> str:
    """The last step of its run, where the run's folder can be read from here; else the last line of its log."""
    from distft.cli.view import describe_step
    from distft.runs import training_curve

    curve = training_curve(job.folder.metrics) if job.folder else []
    if curve:
        return describe_step(curve[-1])
    try:
        said = last_line(cluster.log(job.id))
    except RunError:  # its node is gone, and the log with it
        said = ""
    return said or last_line(job.message)


def last_line(said: str) -> str:
    """What was said last of the run itself; what follows ``Next`` are commands for whoever would run it here."""
    return said.partition("\nNext\n")[0].strip().rpartition("\n")[2].strip()


def _connected(address: str) -> Cluster:
    from distft.orchestrate.submission.jobs import Cluster

    cluster = Cluster(address)
    if cluster.exposes_token:
        typer.echo(
            f"distft: {cluster.url}: the token goes over the network in clear; better through a tunnel "
            "(ssh -L 8265:localhost:8265 HOST) or https",
            err=True,
        )
    return cluster


def _follow(cluster: Cluster, id: str) -> None:
    """Shows a job's log until it ends, and ends as it ended."""

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        job = cluster.follow(id, say)
    except KeyboardInterrupt:
        back = f"distft logs {id} --follow --address {cluster.url}"
        raise Interrupted(f"\n{id} goes on on the cluster", fix=f"come back with: {back}") from None
    if job.status == "finished":
        return
    if job.status == "stopped":
        fix = f"go on with: distft submit JOB --name {job.run} --resume --address {cluster.url}"
        raise Interrupted("it was stopped", where=id, fix=fix)
    if job.exit_status == NOT_FOUND:
        fix = "start Ray there with its environment's bin folder on the PATH"
        raise RunError("the node of the driver has no `python` on its PATH", where=id, fix=fix)
    if job.exit_status is None:
        raise RunError(
            f"the cluster ended it: {(job.message.strip().splitlines() or ['without a reason'])[-1]}",
            where=id,
            fix=f"once mended, go on with: distft submit JOB --name {job.run} --resume --address {cluster.url}",
        )
    sys.stderr.write(f"distft: {id}: failed with exit status {job.exit_status}; its log, above, says why\n")
    raise typer.Exit(job.exit_status)

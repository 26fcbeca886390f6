"""The ``distft`` command. Each command imports the rooms it needs when it runs, so that help and checks are instant."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distft.cli.arguments import (
    JobFile,
    Json,
    Name,
    Overrides,
    Resume,
    RunName,
    Runs,
    find,
    load,
    print_json,
    runs_in,
    viewing,
)
from distft.cli.doctor import doctor
from distft.cli.planning import plan
from distft.cli.proving import audit, blame, chaos, verify
from distft.cli.reports import report, runs, show
from distft.cli.submission import logs, status, stop, submit
from distft.errors import ClusterLost, DistftError, JobError
from distft.log import quieten_libraries
from distft.runs import read_json

app = typer.Typer(
    help="Fine-tune GPT-style language models on any Ray cluster: one YAML file, the same loss curve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    """Options of every command; :func:`main` reads them."""


@app.command()
def check(
    job: Annotated[Path | None, typer.Argument(metavar="JOB", help="The job file (YAML).")] = None,
    set_: Overrides = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print every key of a job file, with what it takes, as Markdown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read and validate the job file; every error at once."""
    if reference:
        from distft.config.reference import reference as describe

        typer.echo(describe(), nl=False)
        return
    if job is None:
        raise JobError("which job file?", where="JOB", fix="distft check JOB.yaml")
    checked = load(job, set_)
    if as_json:
        print_json({"job": str(job), "ok": True, "settings": checked.dump()})
    else:
        workers = checked.cluster.workers
        typer.echo(
            f"{job}: fine. {checked.task.kind.replace('_', ' ')} with {checked.model.source} on "
            f"{workers} worker{'' if workers == 1 else 's'}"
        )


@app.command()
def prepare(
    job: JobFile,
    set_: Overrides = None,
    show: Annotated[
        int, typer.Option(metavar="N", min=0, help="Show N rows of the training split, and which tokens are targets.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make token ids of the data once, cached by content; print the data card."""
    if show and as_json:
        raise JobError("--json prints one document and nothing else", where="--show", fix="leave one of the two out")
    from distft.data.store import Prepared
    from distft.orchestrate.cluster import connected
    from distft.orchestrate.data import prepare as prepare_data
    from distft.orchestrate.listener import SILENT

    loaded = load(job, set_)
    with viewing() as view, connected(loaded.cluster.address):
        data = prepare_data(loaded, SILENT if as_json else view)
    if as_json:
        print_json(Prepared.open(data.prepared).card)
        return
    if show:
        from rich.console import Console

        from distft.cli.rows import show as show_rows

        show_rows(data.prepared, data.model, show, Console(highlight=False))
    typer.echo(f"\nPrepared rows: {data.prepared}")


@app.command()
def run(job: JobFile, set_: Overrides = None, name: Name = None, resume: Resume = False, runs: Runs = None) -> None:
    """The whole way: prepare, search, train, export, evaluate, report."""
    from distft.cli.tables import summary
    from distft.orchestrate.run import run as whole_way

    loaded = load(job, set_)
    with viewing() as view:
        made = whole_way(loaded, runs=runs_in(runs), name=name, resume=resume, listener=view)
    typer.echo(summary(made, job, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))


@app.command()
def train(job: JobFile, set_: Overrides = None, name: Name = None, resume: Resume = False, runs: Runs = None) -> None:
    """Prepare and train, without evaluation and export."""
    from distft.cli.tables import DISTFT, elsewhere
    from distft.orchestrate.run import train as train_job

    loaded = load(job, set_)
    with viewing() as view:
        made = train_job(loaded, runs=runs_in(runs), name=name, resume=resume, listener=view)
    typer.echo(f"\nTrained: {made.folder}\n\nNext")
    for command in ("export", "evaluate"):
        typer.echo(f"  {DISTFT} {command} {made.name}{elsewhere(made)}")


@app.command()
def search(job: JobFile, set_: Overrides = None, name: Name = None, resume: Resume = False, runs: Runs = None) -> None:
    """Find settings: many short trainings that share the cluster; see the job's search section."""
    from distft.cli.proofs import console
    from distft.cli.tables import DISTFT, elsewhere
    from distft.cli.trials import best_first, next_commands, result_lines, trial_table
    from distft.orchestrate.run import search as search_job
    from distft.tuning.trials import best_trial, read_trials

    loaded = load(job, set_)
    with viewing() as view:
        made = search_job(loaded, runs=runs_in(runs), name=name, resume=resume, listener=view)
    found, trials, out = read_json(made.search_summary), read_trials(made.trials), console()
    best = best_trial(trials, found["mode"])
    out.print(trial_table(best_first(trials, found["mode"]), found["metric"], best))
    next_ones = [f"  {command}{elsewhere(made)}" for command in next_commands(DISTFT, job, made.name, best)]
    for line in ("", *result_lines(made, trials, found), "", "Next", *next_ones):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def evaluate(
    run: RunName,
    split: Annotated[str, typer.Option(help="validation or test")] = "test",
    model: Annotated[str, typer.Option(help="base, best or last")] = "best",
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Score a model of the run, with confidence intervals."""
    from distft.cli.tables import score_lines
    from distft.orchestrate.listener import SILENT
    from distft.orchestrate.results import evaluate as score

    _one_of("--split", split, ("validation", "test"))
    _one_of("--model", model, ("base", "best", "last"))
    found = find(run, runs)
    with viewing() as view:
        scores = score(found, split=split, model=model, listener=SILENT if as_json else view)
    if as_json:
        print_json(scores)
    else:
        typer.echo("\n".join(score_lines(scores, split)))


@app.command()
def export(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="A run's name or path.")] = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to write [default: RUN/export].")] = None,
    merge: Annotated[
        bool, typer.Option("--merge-adapter/--no-merge-adapter", help="A whole model, or [RUN/adapter] its LoRA alone.")
    ] = True,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Write nothing: prove that a folder, a .gguf file or a server's URL (its key in OPENAI_API_KEY) is "
            "the trained model, by the certificate in it, or that of RUN.",
        ),
    ] = None,
    runs: Runs = None,
) -> None:
    """Write the best model as a Hugging Face folder; or check a copy of it."""
    if check is not None:
        from distft import certificate
        from distft.certificate.check import check as prove
        from distft.world import api_key

        held = certificate.read(Path(check) if run is None else find(run, runs).export)
        typer.echo(f"{check}: {prove(held, check, api_key())}")
        return
    if run is None:
        raise JobError("which run?", where="RUN", fix="distft export RUN; distft runs names them")
    from distft.orchestrate.results import export as write

    with viewing() as view:
        folder = write(find(run, runs), to=to, merge=merge, listener=view)
    typer.echo(folder)


@app.command()
def generate(
    run: RunName,
    prompt: Annotated[str, typer.Option(help="The text to continue, or what a user says; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw, where temperature > 0.")] = 0,
    model: Annotated[str, typer.Option(help="best or base")] = "best",
    runs: Runs = None,
) -> None:
    """Write with the exported model: an answer, put as in training, or the rest of a text."""
    from distft.orchestrate.writing import generate as write

    _one_of("--model", model, ("base", "best"))
    text = sys.stdin.read() if prompt == "-" else prompt
    for piece in write(
        find(run, runs), text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, model=model
    ):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs to serve; NAME=RUN calls one otherwise.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="And the port.")] = 8000,
    replicas: Annotated[int | None, typer.Option(min=1, help="Copies of each model [default: serve.replicas].")] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, transformers or vllm (the extra vllm) [default: serve.engine].")
    ] = None,
    address: Annotated[str, typer.Option(help="The Ray cluster: auto, local or an address.")] = "auto",
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, a line each [default: DISTFT_API_KEYS, or one made].")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Ask nobody for a key.")] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Serve the model that the first run began with too, called base.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Put them in the place of what the cluster serves under these names.")
    ] = False,
    runs: Runs = None,
) -> None:
    """Answer over HTTP as OpenAI's API does, with models that are proved to be the trained ones; until Ctrl-C."""
    from distft.cli.serving import how_to_ask
    from distft.orchestrate.serving.server import serve as serving
    from distft.orchestrate.serving.server import update as put
    from distft.orchestrate.signals import wait_for_stop

    if engine is not None:
        _one_of("--engine", engine, ("auto", "transformers", "vllm"))
    named = [(name, run) if equals else (None, name) for name, equals, run in (one.partition("=") for one in models)]
    found = {name or run.name: run for name, run in ((name, find(run, runs)) for name, run in named)}
    if len(found) < len(models):
        raise JobError("two models have the same name", where=" ".join(models), fix="call one otherwise: NAME=RUN")
    if update and base:
        raise JobError("--update takes runs alone", where="--base", fix="serve the base from the beginning")
    with viewing() as view:
        if update:
            put(found, address=address, listener=view)
            return
        options: dict[str, Any] = {"host": host, "port": port, "replicas": replicas, "engine": engine, "base": base}
        with serving(
            found, **options, address=address, key_file=api_key_file, insecure=insecure, listener=view
        ) as answering:
            for line in how_to_ask(answering):
                view.note(line)
            wait_for_stop(answering.check)


for _command in (plan, report, runs, show, audit, blame, verify, chaos, submit, status, logs, stop, doctor):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line; errors go to standard error as one clear message, with the contract's exit status."""
    quieten_libraries()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        app([word for word in words if word != "--debug"])
    except DistftError as error:
        if "--debug" in words:
            raise
        sys.stderr.write(f"distft: {error}\n")
        if isinstance(error, ClusterLost):  # as Python ends, Ray would leave the cluster, which it cannot
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_status)
        raise SystemExit(error.exit_status) from None
    raise AssertionError("typer leaves by SystemExit")


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise JobError(f"{value!r} is not one of {', '.join(choices)}", where=option)

"""The ``distft`` command. Each command imports the rooms it needs when it runs, so that help and checks are instant."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from distft.errors import DistftError, JobError, RunError
from distft.log import quieten_libraries
from distft.runs import Run, read_json
from distft.world import runs_folder

if TYPE_CHECKING:
    from distft.cli.view import View
    from distft.config import Job

app = typer.Typer(
    help="Fine-tune GPT-style language models on any Ray cluster: one YAML file, the same loss curve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    """Options of every command; :func:`main` reads them."""


@app.command()
def check(job: JobFile, set_: Overrides = None, as_json: Json = False) -> None:
    """Read and validate the job file; every error at once."""
    checked = _load(job, set_)
    if as_json:
        _print_json({"job": str(job), "ok": True, "settings": checked.dump()})
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

    loaded = _load(job, set_)
    with _view() as view, connected(loaded.cluster.address):
        data = prepare_data(loaded, SILENT if as_json else view)
    if as_json:
        _print_json(Prepared.open(data.prepared).card)
        return
    if show:
        from rich.console import Console

        from distft.cli.rows import show as show_rows

        show_rows(data.prepared, data.model, show, Console(highlight=False))
    typer.echo(f"\nPrepared rows: {data.prepared}")


@app.command()
def run(job: JobFile, set_: Overrides = None, name: Name = None, resume: Resume = False, runs: Runs = None) -> None:
    """The whole way: prepare, search, train, export, evaluate."""
    from distft.cli.tables import summary
    from distft.orchestrate.run import run as whole_way

    loaded = _load(job, set_)
    with _view() as view:
        made = whole_way(loaded, runs=_runs(runs), name=name, resume=resume, listener=view)
    typer.echo(summary(made, job))


@app.command()
def train(job: JobFile, set_: Overrides = None, name: Name = None, resume: Resume = False, runs: Runs = None) -> None:
    """Prepare and train, without evaluation and export."""
    from distft.orchestrate.run import train as train_job

    loaded = _load(job, set_)
    with _view() as view:
        made = train_job(loaded, runs=_runs(runs), name=name, resume=resume, listener=view)
    typer.echo(f"\nTrained: {made.folder}\nNext: distft export {made.name}    distft evaluate {made.name}")


@app.command()
def search(job: JobFile, set_: Overrides = None, name: Name = None, resume: Resume = False, runs: Runs = None) -> None:
    """Find settings: many short trainings that share the cluster; see the job's search section."""
    from distft.cli.proofs import console
    from distft.cli.tables import DISTFT
    from distft.cli.trials import best_first, next_commands, result_lines, trial_table
    from distft.orchestrate.run import search as search_job
    from distft.tuning.trials import best_trial, read_trials

    loaded = _load(job, set_)
    with _view() as view:
        made = search_job(loaded, runs=_runs(runs), name=name, resume=resume, listener=view)
    found, trials, out = read_json(made.search_summary), read_trials(made.trials), console()
    best = best_trial(trials, found["mode"])
    out.print(trial_table(best_first(trials, found["mode"]), found["metric"], best))
    next_ones = [f"  {command}" for command in next_commands(DISTFT, job, made.name, best)]
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
    found = _find(run, runs)
    with _view() as view:
        scores = score(found, split=split, model=model, listener=SILENT if as_json else view)
    if as_json:
        _print_json(scores)
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

        held = certificate.read(Path(check) if run is None else _find(run, runs).export)
        typer.echo(f"{check}: {prove(held, check, api_key())}")
        return
    if run is None:
        raise JobError("which run?", where="RUN", fix="distft export RUN; distft runs names them")
    from distft.orchestrate.results import export as write

    with _view() as view:
        folder = write(_find(run, runs), to=to, merge=merge, listener=view)
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
        _find(run, runs), text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, model=model
    ):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs to serve; NAME=RUN calls one otherwise.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="And the port.")] = 8000,
    replicas: Annotated[int | None, typer.Option(min=1, help="Copies of each model [default: serve.replicas].")] = None,
    engine: Annotated[str, typer.Option(help="auto or transformers; vllm is not built yet.")] = "auto",
    address: Annotated[str, typer.Option(help="The Ray cluster: auto, local or an address.")] = "auto",
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, a line each [default: DISTFT_API_KEYS, or one made].")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Ask nobody for a key.")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Put them in the place of what the cluster serves under these names.")
    ] = False,
    runs: Runs = None,
) -> None:
    """Answer over HTTP as OpenAI's API does, with models that are proved to be the trained ones; until Ctrl-C."""
    from distft.cli.serving import how_to_ask
    from distft.orchestrate.serving import serve as serving
    from distft.orchestrate.serving import update as put
    from distft.orchestrate.signals import wait_for_stop

    _one_of("--engine", engine, ("auto", "transformers"))
    named = [(name, run) if equals else (None, name) for name, equals, run in (one.partition("=") for one in models)]
    found = {name or run.name: run for name, run in ((name, _find(run, runs)) for name, run in named)}
    if len(found) < len(models):
        raise JobError("two models have the same name", where=" ".join(models), fix="call one otherwise: NAME=RUN")
    with _view() as view:
        if update:
            put(found, address=address, listener=view)
            return
        options: dict[str, Any] = {"host": host, "port": port, "replicas": replicas}
        with serving(
            found, **options, address=address, key_file=api_key_file, insecure=insecure, listener=view
        ) as answering:
            for line in how_to_ask(answering):
                view.note(line)
            wait_for_stop()


@app.command()
def audit(run: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """Prove from plan and log that every training row was used once an epoch."""
    from distft.cli.proofs import audit_lines, audit_problem, audit_table, console
    from distft.ledger.audit import audit as hold
    from distft.ledger.plan import plan_of
    from distft.train.folder import job_of

    found = _find(run, runs)
    result = hold(plan_of(job_of(found), found), found)
    if as_json:
        _print_json(result.as_json())
    else:
        out = console()
        out.print(audit_table(result))
        for line in audit_lines(result):
            out.print(line, markup=False)
    if not result.sound:
        raise RunError(audit_problem(result), where=found.name)


@app.command()
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

    found = _find(run, runs)
    job = job_of(found)
    folder = materialise(job.model, job.folder)
    result = rows_of(plan_of(job, found), found, folder, step, trust_remote_code=job.model.trust_remote_code)
    if as_json:
        value = result.as_json()
        _print_json({**value, "rows": value["rows"][:top]})
        return
    out = console()
    for line in blame_lines(result, top):
        out.print(line, markup=False)
    out.print(blame_table(result, top))


@app.command()
def verify(job: JobFile, set_: Overrides = None, as_json: Json = False) -> None:
    """Prove on this job, made small, that workers, ZeRO stages, micro-batches and a kill change nothing."""
    from distft.cli.proofs import console, verify_lines, verify_table
    from distft.orchestrate.listener import SILENT
    from distft.orchestrate.proof.verify import verify as prove

    loaded = _load(job, set_)
    with _view() as view:
        proof = prove(loaded, SILENT if as_json else view)
    if as_json:
        _print_json(proof.as_json())
    else:
        out = console()
        out.print(verify_table(proof))
        for line in verify_lines(proof):
            out.print(line, markup=False)
    if proof.problems:
        raise RunError("\n  ".join(["an invariant fails", *proof.problems]), where=str(job))


@app.command()
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

    _load(job, set_)
    with _view() as view:
        report = disturb(
            job,
            set_ or [],
            runs=_runs(runs),
            kills=kills,
            name=name,
            seed=seed,
            reference=reference,
            yes=yes,
            listener=SILENT if as_json else view,
        )
    if as_json:
        _print_json(report.as_json())
    else:
        out = console()
        out.print(chaos_table(report))
        out.print(goodput_table(report.goodput))
        for line in chaos_lines(report):
            out.print(line, markup=False)
    if report.problems:
        raise RunError("\n  ".join(["not everything survived", *report.problems]), where=report.run)


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
        raise SystemExit(error.exit_status) from None
    raise AssertionError("typer leaves by SystemExit")


def _load(path: Path, overrides: list[str] | None) -> Job:
    """The job, checked as far as that is possible without torch, Ray or reading the data."""
    from distft.config import Job, UnusableFiles
    from distft.config import check as check_files

    job = Job.load(path, overrides or [])
    problems = check_files(job)
    if problems:
        raise UnusableFiles(problems)
    return job


def _runs(folder: Path | None) -> Path:
    return folder or runs_folder()


def _find(name: str, runs: Path | None) -> Run:
    return Run.find(name, _runs(runs))


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise JobError(f"{value!r} is not one of {', '.join(choices)}", where=option)


@contextmanager
def _view() -> Iterator[View]:
    from rich.console import Console

    from distft.cli.view import View

    with View(Console(highlight=False)) as view:
        yield view


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))

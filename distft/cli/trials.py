"""The trials of a search for a person: as they go, and what they came to. All pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from distft.runs import Run
from distft.tuning.labels import number, score, settings, short_names, varied
from distft.tuning.progress import SearchProgress
from distft.tuning.trials import Params, Trial, best_trial, ranked

#: How a trial's state looks; the best one's line is green and has a star, which is seen without colour too.
STYLES = {"running": "cyan", "finished": "", "stopped": "dim", "failed": "red"}
BEST = "★"


def trial_table(trials: Sequence[Trial], metric: str, best: Trial | None) -> Table:
    """One line a trial, in the order given: settings, tokens, objective, state.

    Args:
        trials: The lines.
        metric: What is compared, ``validation.loss``.
        best: The one to mark.
    """
    names = varied(trials)
    short = short_names(names)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for title in (*(short[name] for name in names), "tokens", metric):
        table.add_column(_two_lines(title), justify="right", no_wrap=True, vertical="bottom")
    table.add_column("state", no_wrap=True)
    for trial in trials:
        numbers = (number(trial.params[name]) if name in trial.params else "-" for name in names)
        is_best = best is not None and trial.id == best.id
        table.add_row(
            f"{trial.id} {BEST if is_best else ' '}",
            *numbers,
            f"{trial.tokens:,}",
            score(trial.objective),
            trial.status,
            style="bold green" if is_best else STYLES[trial.status],
        )
    return table


def shown(trials: Sequence[Trial], mode: Literal["min", "max"], lines: int) -> list[Trial]:
    """As many trials as there are lines for, in their order: those that run, newest first, and the best of the others.

    The best one of all is always among them.
    """
    running = [trial for trial in trials if trial.status == "running"]
    best = best_trial(trials, mode)
    rest = best_first([trial for trial in trials if trial.status != "running"], mode)
    kept = {best.id: best} if best else {}
    for trial in (*reversed(running), *rest):
        if len(kept) < lines:
            kept.setdefault(trial.id, trial)
    return sorted(kept.values(), key=lambda trial: trial.number)


def best_first(trials: Sequence[Trial], mode: Literal["min", "max"]) -> list[Trial]:
    """By objective; then those without one, and failed ones last, by number."""
    known = ranked(trials, mode)
    names = {trial.id for trial in known}
    rest = [trial for trial in trials if trial.id not in names]
    return [*known, *sorted(rest, key=lambda trial: (trial.status == "failed", trial.number))]


def progress_line(progress: SearchProgress) -> str:
    """``best so far 003: validation.loss 3.412 with learning_rate 3.1e-4 · 7 of 12 trials done · about 4 min left``."""
    best = best_trial(progress.trials, progress.mode)
    failed = sum(trial.status == "failed" for trial in progress.trials)
    parts = [
        f"best so far {_found(best, progress.metric)}" if best else f"no {progress.metric} yet",
        f"{progress.ended:,} of {progress.of:,} trials done{f' ({failed:,} failed)' if failed else ''}",
    ]
    if progress.seconds_left is not None and progress.ended < progress.of:
        parts.append(f"{about(progress.seconds_left)} left")
    return " · ".join(parts)


def ended_line(trial: Trial, metric: str) -> str:
    """What became of a trial: ``trial 003 stopped after 8,192 tokens: validation.loss 3.412 with epochs 2``."""
    reached = "" if trial.objective is None else f"{metric} {score(trial.objective)} with "
    why = f": {' '.join(trial.reason.split())}" if trial.reason else ""
    return f"trial {trial.id} {trial.status} after {trial.tokens:,} tokens: {reached}{settings(trial.params)}{why}"


def failure_lines(trials: Sequence[Trial]) -> list[str]:
    """Why trials failed, a line a reason, with the trials that it took."""
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        if trial.status == "failed":
            reasons.setdefault(" ".join((trial.reason or "no reason known").split()), []).append(trial.id)
    return [f"failed {', '.join(ids)}: {reason}" for reason, ids in reasons.items()]


def result_lines(run: Run, trials: Sequence[Trial], found: Mapping[str, Any]) -> list[str]:
    """What a search came to, below the table of its trials.

    Args:
        run: The run that it belongs to.
        trials: All of them.
        found: ``search/summary.json``.
    """
    best = best_trial(trials, found["mode"])
    shares = found["importance"]
    short = short_names(shares)
    return [
        *failure_lines(trials),
        *([f"Best {_found(best, found['metric'])}"] if best else []),
        *(
            [f"Importance {', '.join(f'{short[name]} {share:.0%}' for name, share in shares.items())}"]
            if shares
            else []
        ),
        f"Learning curves: {run.learning_curves}, parallel coordinates: {run.parallel_coordinates}",
    ]


def next_commands(distft: str, job_file: Path, name: str, best: Trial | None) -> list[str]:
    """What to do with the best settings: train on them in the same run, or in one of its own.

    Args:
        distft: How a person calls the command.
        job_file: The job file, as the person named it.
        name: The name of the search's run.
        best: The best trial.
    """
    commands = [f"{distft} run {job_file} --name {name} --resume"]
    if best:
        commands.append(f"{distft} run {job_file} --name {name}-best --set search=null {_set_arguments(best.params)}")
    return commands


def _set_arguments(params: Params) -> str:
    """The settings to the last digit, as a command takes them: ``--set train.learning_rate=0.00031``."""
    return " ".join(f"--set {name}={value!r}" for name, value in params.items())


def about(seconds: float) -> str:
    """``less than a minute``, ``about 4 min``, ``about 2 h 10 min``: no finer than an estimate is."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    if minutes < 55:
        return f"about {minutes} min"
    tens = round(minutes / 10) * 10
    return f"about {tens // 60} h" + (f" {tens % 60} min" if tens % 60 else "")


def _found(trial: Trial, metric: str) -> str:
    return f"{trial.id}: {metric} {score(trial.objective)} with {settings(trial.params)}"


def _two_lines(title: str) -> str:
    """A heading with its last part on a line of its own, since a column is seldom wider than its numbers need."""
    cut = max(title.rfind("_"), title.rfind(".")) + 1
    return f"{title[:cut]}\n{title[cut:]}" if cut else title

"""What a run came to, as a few lines for a person."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.report.verdict import sentence as verdict
from distft.report.verdict import title_of
from distft.runs import Run, read_json
from distft.task.metrics import METRICS, headline
from distft.train.folder import job_of
from distft.world import runs_folder

#: The command as a person can type it, also where the environment is not activated; found before any stage runs, since
#: the engine puts the environment's scripts on the path.
DISTFT = (
    "distft"
    if shutil.which("distft")
    else f"{sys.executable} -m distft"
    if sys.argv[0].endswith("__main__.py")
    else sys.argv[0]
)
HEADINGS = {"base": "base", "best": "tuned", "last": "last", "difference": "difference (paired)"}
#: The most classes whose confusion matrix is shown, and the most that have lines of their own.
MATRIX_CLASSES, LISTED_CLASSES = 8, 20


def score_lines(scores: dict[str, Any], split: str) -> list[str]:
    """Base beside tuned on a split, with 95 % intervals, one line a metric; then a classifier's classes.

    Args:
        scores: ``evaluation.json``.
        split: validation or test.
    """
    columns = {
        kind: scores[kind][split] for kind in ("base", "best", "last", "difference") if split in scores.get(kind, {})
    }
    if not columns:
        return []
    classes = {kind: parts[split] for kind, parts in scores.get("classes", {}).items() if split in parts}
    headings = HEADINGS | ({"base": "labels' shares"} if classes else {})
    counts = {name: its["n"] for column in columns.values() for name, its in column.items()}
    read = max(counts.values())
    answered = next((counts[name] for name in counts if METRICS[name].answers), read)
    asked = "" if answered == read else f", {answered} of them answered"
    lines = [
        f"{split.capitalize()} split, {read} documents{asked}, 95 % intervals",
    ]
    rows = [
        ["", *(headings[kind] for kind in columns)],
        *(
            [title_of(name, classes=bool(classes)), *(cell(column.get(name)) for column in columns.values())]
            for name in counts
        ),
    ]
    widths = [3 + max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines += [
        "  " + "".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if any(kind != "base" for kind in classes):
        lines += class_lines(next(parts for kind, parts in classes.items() if kind != "base"))
    return lines


def cell(estimate: Mapping[str, float] | None) -> str:
    """``17.31 (16.02 to 18.55)``; a difference's p-value is in ``evaluation.json``."""
    if estimate is None:
        return "-"
    return f"{estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"


def class_lines(classes: Mapping[str, Any]) -> list[str]:
    """The per-class table, hardest first where not all fit, and beside it the confusion matrix of a few classes."""
    labels, matrix = classes["labels"], classes["confusion"]
    names = list(labels)
    width = min(24, max(len("label"), *map(len, names)))
    square = len(names) <= MATRIX_CLASSES
    shown = (
        names if len(names) <= LISTED_CLASSES else sorted(names, key=lambda name: labels[name]["f1"])[:LISTED_CLASSES]
    )
    cells = max(6, *(len(str(count)) + 1 for row in matrix for count in row)) if square else 0
    numbers = "".join(f"{f'[{number}]':>{cells}}" for number in range(1, len(names) + 1)) if square else ""
    lines = ["", f"  {'label':<{width + 4}}{'precision':>10}{'recall':>8}{'F1':>8}{'texts':>8}"]
    if square:
        lines[-1] += f"   taken for{numbers}"
    for name in shown:
        number, its = names.index(name) + 1, labels[name]
        line = f"  {f'[{number}] ' if square else ''}{_cut(name, width)}".ljust(width + 6)
        line += f"{its['precision']:>10.3f}{its['recall']:>8.3f}{its['f1']:>8.3f}{its['support']:>8}"
        if square:
            line += " " * len("   taken for") + "".join(f"{count:>{cells}}" for count in matrix[number - 1])
        lines.append(line)
    if len(shown) < len(names):
        lines.append(f"  ... and {len(names) - len(shown)} labels with a higher F1: evaluation.json has them all")
    return lines


def summary(run: Run, job_file: Path, width: int | None = None) -> str:
    """The end of ``distft run``: scores, the same prompt by both models, where things are, what to try next.

    Args:
        run: The finished run.
        job_file: The job file, as the person named it.
        width: Letters of a line of the terminal; None: texts stand on one line each.
    """
    result, job = read_json(run.result), job_of(run)
    lines = [""]
    if run.evaluation.exists():
        scores = read_json(run.evaluation)
        lines += [*score_lines(scores, "test"), verdict(scores, "test", headline(job)), ""]
    sample = result.get("sample")
    if sample:
        lines += [*sample_lines(sample, width), ""]
    loads = "AutoModelForSequenceClassification" if job.task.kind == "classification" else "AutoModelForCausalLM"
    return "\n".join(
        [
            *lines,
            f"Run     {run.folder}",
            f"Model   {run.export}  (transformers: {loads}.from_pretrained)",
            *([f"Report  {run.report}"] if run.report.exists() else []),
            *([f"Answers {run.answers}"] if run.answers.exists() else []),
            "",
            "Next",
            *(f"  {command}" for command in _next(run, job, job_file, result["step"], sample)),
        ]
    )


def sample_lines(sample: Mapping[str, str], width: int | None = None) -> list[str]:
    """A row of the data, and what the models make of it; where there is a width, none is wider."""
    titles = {"prompt": "Prompt", "reference": "  data", "base": "  base", "best": "  tuned"}
    told = [(f"{title:<8}", _cut(" ".join(sample[key].split()), 500)) for key, title in titles.items() if key in sample]
    if width is None:
        return [title + text for title, text in told]
    return [
        line
        for title, text in told
        for line in textwrap.wrap(text, max(40, width), initial_indent=title, subsequent_indent=" " * len(title))
        or [title]
    ]


def _next(run: Run, job: Job, job_file: Path, step: int, sample: Mapping[str, str] | None) -> Sequence[str]:
    """Commands to go on with."""
    there = elsewhere(run)
    commands = [
        f"{DISTFT} serve {run.name}{there}",
        f"{DISTFT} run {job_file} --name {run.name}-longer --set train.steps={3 * step}{there}",
    ]
    if job.task.kind == "classification":
        return commands
    if job.task.kind == "generation":
        prompt = " ".join(sample["prompt"].split()) if sample and len(sample["prompt"]) <= 200 else "Who are you?"
        return [f"{DISTFT} generate {run.name} --prompt {shlex.quote(prompt)}{there}", *commands]
    words = " ".join(sample["prompt"].split()[:5]) if sample else "Once upon a time"
    return [f"{DISTFT} generate {run.name} --prompt {shlex.quote(words)} --temperature 0.8{there}", *commands]


def elsewhere(run: Run) -> str:
    """The option with which a command finds a run that is not where runs are without it."""
    folder = run.folder.parent
    return "" if folder == runs_folder().resolve() else f" --runs {shlex.quote(str(folder))}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"

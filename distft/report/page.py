"""A run on one page: everything it shows, put into ``page.html``. All text is escaped there, whoever wrote it."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from distft import __version__
from distft.errors import JobError
from distft.report import tables
from distft.report.charts import Colour, Drawn, draw, thousands
from distft.report.curves import MARKED, curves, interval_picture, marked
from distft.report.facts import Facts, read
from distft.report.search import search
from distft.report.verdict import interval, judge, sentence_case, title_of
from distft.report.words import duration, moment, without_passwords
from distft.runs import Run

_HERE = Path(__file__).parent
SECTIONS = {
    "scores": "Scores",
    "examples": "Examples",
    "charts": "Training",
    "times": "Time",
    "data": "Data",
    "search": "Search",
}
IDS = {"charts": "training", "times": "time"}


def write(run: Run, to: Path | None = None) -> Path:
    """Writes a run's page, whole or not at all.

    Args:
        run: The run, in whatever state.
        to: The file; the run's ``report.html`` where it is None.

    Returns:
        The file.

    Raises:
        JobError: It cannot be written there.
    """
    return put(render(read(run)), to or run.report)


def put(page: str, to: Path) -> Path:
    """Writes a page, whole or not at all.

    Raises:
        JobError: It cannot be written there.
    """
    temporary = to.with_name(f".{to.name}.part")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(to)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise JobError(
            f"the report cannot be written: {error.strerror}",
            where=str(to),
            fix="name another file: distft report RUN --to FILE.html",
        ) from error
    return to.resolve()


def render(facts: Facts) -> str:
    """The page of a run as HTML."""
    problems = list(facts.problems)
    shown = {name: _part(name, make, facts, problems) for name, make in PARTS.items()}
    present = [name for name in SECTIONS if shown[name] or (name == "examples" and shown["sample"])]
    return fill(
        "page.html",
        title=f"{facts.run.name}: report",
        about=_about(facts),
        sections=[
            ("verdict", "Verdict"),
            *((IDS.get(name, name), SECTIONS[name]) for name in present),
            ("again", "How to get this again"),
        ],
        problems=problems,
        verdict=judge(facts),
        open=facts.status in ("begun", "running", "searched") and facts.silent_seconds is None,
        intervals=_part("scores", _intervals, facts, problems),
        tiles=_part("figures", _tiles, facts, problems) or [],
        marked=[(name, MARKED[name]) for name in marked(facts.events)],
        goodput=_goodput(facts),
        commands=without_passwords(_commands(facts)),
        decisions=_part("decisions", tables.decisions, facts, problems),
        job_text=without_passwords(facts.job_text),
        environment=_environment(facts.environment),
        footer=f"Made by distft {__version__} on {moment(time.time())} from {facts.run.folder}",
        **shown,
    )


def _part(name: str, make: Callable[[Facts], Any], facts: Facts, problems: list[str]) -> Any:
    """A part of the page; None, and a problem that is told, where the run's files are not what they should be."""
    try:
        return make(facts)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"{name} cannot be shown: a file is damaged or of another version ({type(error).__name__}: {error})"
        if told not in problems:
            problems.append(told)
        return None


def fill(template: str, **shown: Any) -> str:
    """A template with the page's style and script."""
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"css": Markup(_file("page.css")), "script": Markup(script), "digest": digest}  # ours, and no one else's
    return _templates().get_template(template).render(**shown, **own)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        auto_reload=False,  # as style and script, they are read once
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _about(facts: Facts) -> str:
    kind = facts.kind.replace("_", " ")
    adapter = facts.job.model.adapter if facts.job else None
    how = "" if adapter is None else f", {adapter.kind} of rank {adapter.rank}"
    return f"{kind[0].upper()}{kind[1:]} with {facts.model}{how}, begun {moment(facts.when)}"


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    """The run in a few figures."""
    tiles = [("state", facts.status)]
    if facts.silent_seconds is not None:
        tiles.append(("last heard of", f"{duration(facts.silent_seconds)} ago"))
    if facts.step:
        tiles.append(("steps", f"{facts.step:,}" + (f" of {facts.planned:,}" if facts.planned else "")))
    if facts.wall_seconds:
        tiles.append(("wall time", duration(facts.wall_seconds)))
    tokens = sum(line.get("tokens") or 0 for line in facts.steps)
    if tokens:
        tiles.append(("training tokens", thousands(tokens)))
    if facts.steps and "world_size" in facts.steps[-1]:
        stage = (facts.resolved.get("decisions") or {}).get("zero.stage", {}).get("value")
        zero = "" if stage is None else f", ZeRO {stage}"
        tiles.append(("workers", f"{facts.steps[-1]['world_size']}{zero}"))
    if facts.result.get("restarts"):
        tiles.append(("restarts", str(facts.result["restarts"])))
    return tiles


def _intervals(facts: Facts) -> dict[str, str] | None:
    """Base and tuned by the first metric, drawn; None where nothing was scored."""
    metric, rows = facts.headline, []
    names: list[tuple[str, str, Colour]] = [("base", "base", "a"), ("best", "tuned", "b")]
    for model, name, colour in names:
        its = facts.scores.get(model, {}).get("test", {}).get(metric) if metric else None
        if its:
            shown = "labels' shares" if model == "base" and "classes" in facts.scores else name
            rows.append((shown, its, colour))
    if metric is None or not rows:
        return None
    says = "; ".join(f"{name} {interval(its)}" for name, its, _ in rows)
    title = title_of(metric, classes="classes" in facts.scores)
    return {
        "title": f"{sentence_case(title)} on the test split, 95 % intervals",
        "says": f"{title}: {says}",
        "svg": interval_picture(rows, "intervals"),
    }


def _goodput(facts: Facts) -> str:
    if facts.spent is None or facts.spent.wall <= 0:
        return ""
    spent = facts.spent
    again = f", workers began {spent.attempts} times" if spent.attempts > 1 else ""
    return f"Goodput {spent.share:.1%}: so much of {duration(spent.wall)} went into steps that stand{again}."


def _sample(facts: Facts) -> list[tuple[str, str]]:
    sample = facts.result.get("sample")
    names = {"prompt": "prompt", "reference": "data", "base": "base", "best": "tuned"}
    if not isinstance(sample, dict):
        return []
    return [(title, tables.cut(str(sample[key]))) for key, title in names.items() if sample.get(key) is not None]


def _commands(facts: Facts) -> str:
    """What to type to get the run again, as far as the folder tells."""
    commit = facts.environment.get("commit")
    version = (facts.environment.get("versions") or {}).get("distft")
    sets = "".join(f" \\\n  --set {shlex.quote(setting)}" for setting in tables.settings_beyond(facts))
    lines = [f"# distft {version or 'of an unknown version'}" + (f", commit {commit}" if commit else "")]
    if commit and str(commit).endswith("-dirty"):
        lines.append("# (with changes that are in no commit)")
    folder = facts.resolved.get("folder")
    if folder:
        lines.append(f"# relative paths in the job file began at {folder}")
    job = facts.run.job
    lines.append(f"distft run {shlex.quote(str(job))} --name {shlex.quote(facts.run.name + '-again')}{sets}")
    return "\n".join(lines)


def _environment(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions and machine, a line each."""
    plain = [(name, str(value)) for name, value in facts.items() if isinstance(value, str | int | float)]
    versions = facts.get("versions")
    return plain + [(name, str(value)) for name, value in (versions.items() if isinstance(versions, dict) else ())]


def _charts(facts: Facts) -> list[Drawn]:
    return [drawn for drawn in map(draw, curves(facts)) if drawn is not None]


PARTS: dict[str, Callable[[Facts], Any]] = {
    "scores": tables.scores,
    "classes": tables.classes,
    "examples": tables.examples,
    "sample": _sample,
    "charts": _charts,
    "times": tables.times,
    "plan": tables.plan,
    "events": tables.events,
    "data": tables.data,
    "search": search,
}

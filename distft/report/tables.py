"""What the page shows as tables and bars, as plain values for its template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distft.config import Job
from distft.data.card import files
from distft.errors import DistftError
from distft.report.facts import Facts, Record
from distft.report.verdict import gained, number, title_of
from distft.report.words import duration, moment, size
from distft.task.metrics import METRICS

HEADINGS = {"base": "base", "best": "tuned", "last": "last", "difference": "difference (paired)"}
#: The most classes whose confusion matrix is shown, and the most that have lines of their own.
MATRIX_CLASSES, LISTED_CLASSES = 20, 40
#: Lines of a list in the page before it is cut, and letters of a text.
LISTED, LETTERS = 60, 1500

PARTS = {
    "compute": ("Training", "steps that stand"),
    "data_wait": ("Waiting for data", "rows read and put together"),
    "validation": ("Validation", "scoring the validation split"),
    "checkpoint": ("Checkpoints", "what saving held training up"),
    "replay": ("Done again", "steps after a kill that had been made before"),
    "restart": ("Restarts", "from a last sign of life to the next step"),
    "startup": ("Start-up", "processes, imports, the model, the first save"),
    "idle": ("Between", "the rest of the time that workers were up"),
}


def scores(facts: Facts) -> list[dict[str, Any]]:
    """For each split that was scored: base beside tuned, with intervals, a row a metric."""
    kinds = [kind for kind in HEADINGS if kind in facts.scores]
    classes = "classes" in facts.scores
    found = []
    for split in ("test", "validation"):
        columns = {kind: facts.scores[kind][split] for kind in kinds if facts.scores[kind].get(split)}
        if not columns:
            continue
        names = dict.fromkeys(name for column in columns.values() for name in column)
        rows = []
        for name in names:
            change = columns.get("difference", {}).get(name)
            better = METRICS[name].better
            rows.append(
                {
                    "title": title_of(name, classes=classes),
                    "better": f"{better} is better" if better else "",
                    "cells": [_cell(column.get(name)) for column in columns.values()],
                    "gain": _gain(name, change),
                    "headline": name == facts.headline,
                }
            )
        headings = [("labels' shares" if classes and kind == "base" else HEADINGS[kind]) for kind in columns]
        found.append({"split": split, "documents": _documents(columns), "headings": headings, "rows": rows})
    return found


def _documents(columns: Mapping[str, Any]) -> str:
    """How many documents were read, and where fewer were answered, how many of them."""
    counts = {name: its["n"] for column in columns.values() for name, its in column.items()}
    read = max(counts.values())
    answered = next((counts[name] for name in counts if METRICS[name].answers), read)
    return f"{read:,} documents" + (f", {answered:,} of them answered" if answered != read else "")


def _cell(estimate: Mapping[str, float] | None) -> tuple[str, str]:
    """A value, and its interval below it."""
    if estimate is None:
        return "-", ""
    return number(estimate["value"]), f"{number(estimate['low'])} to {number(estimate['high'])}"


def _gain(name: str, change: Mapping[str, float] | None) -> tuple[str, str]:
    """Whether a difference is one: its class in the page, and a word."""
    if change is None or METRICS[name].better is None:
        return "", ""
    return {True: ("good", "better"), False: ("bad", "worse"), None: ("", "no clear difference")}[gained(name, change)]


def classes(facts: Facts) -> dict[str, Any] | None:
    """A classifier's per-class table and its confusion matrix on the test split, or else on validation."""
    found = facts.scores.get("classes", {}).get("best", {})
    split = next((split for split in ("test", "validation") if split in found), None)
    if split is None:
        return None
    labels, matrix = found[split]["labels"], found[split]["confusion"]
    names = list(labels)
    hardest = sorted(names, key=lambda name: labels[name]["f1"])[:LISTED_CLASSES]
    shown = names if len(names) <= LISTED_CLASSES else hardest
    confused = sorted(
        (
            (count, names[truth], names[taken])
            for truth, row in enumerate(matrix)
            for taken, count in enumerate(row)
            if count and truth != taken
        ),
        reverse=True,
    )
    return {
        "split": split,
        "names": names,
        "rows": [
            {
                "name": name,
                "number": names.index(name) + 1,
                "shares": [f"{labels[name][share]:.3f}" for share in ("precision", "recall", "f1")],
                "support": f"{labels[name]['support']:,}",
            }
            for name in shown
        ],
        "hidden": len(names) - len(shown),
        "matrix": [_shaded(row) for row in matrix] if len(names) <= MATRIX_CLASSES else None,
        "confused": [{"count": count, "truth": truth, "taken": taken} for count, truth, taken in confused[:10]],
    }


def _shaded(row: Sequence[int]) -> list[dict[str, Any]]:
    """A row's counts, each with its share of the row in whole percents."""
    total = max(1, sum(row))
    return [{"count": f"{count:,}", "share": round(100 * count / total)} for count in row]


def examples(facts: Facts) -> dict[str, Any] | None:
    """Documents from the worst to the best; of older runs the first answers, in the data's order."""
    for split in ("test", "validation"):
        found = facts.examples.get(split)
        if isinstance(found, dict) and found.get("examples"):
            groups: dict[str, list[Record]] = {}
            classes = "classes" in facts.scores
            for one in found["examples"]:
                groups.setdefault(str(one.get("place", "")), []).append(_cut_texts(one, classes=classes))
            metric = str(found.get("metric"))
            scored = facts.scores.get("best", {}).get(split, {}).get(metric, {}).get("n", found["documents"])
            return {
                "split": split,
                "metric": title_of(metric, classes=classes),
                "documents": f"{scored:,.0f}",
                "groups": groups,
                "base": "labels' shares" if classes else "base",
                "asked": "prompt" if METRICS[metric].answers else "text",
            }
    if facts.answers:
        texts = [_cut_texts({"text": one.get("prompt"), **one}) for one in facts.answers[:9]]
        split = str(facts.answers[0].get("split", "test"))
        groups = {"first in the data": texts}
        return {"split": split, "metric": None, "groups": groups, "base": "base", "asked": "prompt"}
    return None


def _cut_texts(one: Record, *, classes: bool = False) -> Record:
    shown = {key: cut(str(one[key])) for key in ("text", "reference", "base", "best") if one.get(key) is not None}
    values = {key: number(one[key]) for key in ("base_value", "best_value") if one.get(key) is not None}
    where = f"{one['source']}, row {one['row']:,}" if "source" in one and "row" in one else ""
    right = {"right": shown["best"] == shown["reference"]} if classes and {"best", "reference"} <= shown.keys() else {}
    return {**shown, **values, **right, "where": where}


def cut(text: str, letters: int = LETTERS) -> str:
    """At most so many letters: the beginning and the end, where it is longer."""
    text = text.strip()
    return text if len(text) <= letters else f"{text[: letters // 2]} … {text[-letters // 2 :]}"


def times(facts: Facts) -> list[dict[str, Any]]:
    """The parts of the wall time, the largest first."""
    if facts.spent is None or facts.spent.wall <= 0:
        return []
    parts = sorted(facts.spent.parts.items(), key=lambda part: -part[1])
    return [
        {
            "title": PARTS[name][0],
            "meaning": PARTS[name][1],
            "useful": name == "compute",
            "time": duration(seconds),
            "percent": round(100 * seconds / facts.spent.wall, 1),
        }
        for name, seconds in parts
        if seconds > 0
    ]


def plan(facts: Facts) -> list[dict[str, str]]:
    """What was predicted of the run beside what was measured, figure by figure."""
    say: dict[str, Callable[[float], str]] = {"bytes": size, "seconds": duration}
    predicted, measured = (facts.plan.get(part) or {} for part in ("predicted", "measured"))
    rows = []
    for name in (name for name in predicted if name in measured):
        expected, found = predicted[name], measured[name]
        if not found:
            continue
        text = say.get(name.rpartition("_")[2], _amount)
        rows.append(
            {
                "name": name.replace("_per_", " per ").replace("_bytes", "").replace("_seconds", "").replace("_", " "),
                "predicted": text(expected),
                "measured": text(found),
                "error": f"{expected / found - 1:+.0%}",
            }
        )
    return rows


def _amount(value: float) -> str:
    return f"{value:,.4g}"


def events(facts: Facts) -> dict[str, Any]:
    """What happened, without checkpoints that went well."""
    told = [line for line in facts.events if line.get("event") != "checkpoint"]
    saves = [line for line in facts.events if line.get("event") == "checkpoint"]
    rows = [
        {
            "when": moment(line["time"]),
            "step": f"{line['step']:,}",
            "event": str(line.get("event")),
            "reason": cut(str(line.get("reason", "")), 600),
        }
        for line in (told if len(told) <= LISTED else [*told[: LISTED // 2], *told[-LISTED // 2 :]])
    ]
    return {"rows": rows, "hidden": max(0, len(told) - LISTED), "checkpoints": len(saves)}


def data(facts: Facts) -> dict[str, Any] | None:
    """The data card."""
    card = facts.card
    if not card:
        return None
    rows, tokens = card.get("rows", {}), card.get("tokens", {})
    splits = []
    for split, counts in tokens.items():
        room = counts.get("all", 0) + counts.get("padding", 0)
        splits.append(
            {
                "name": split,
                "documents": f"{sum(rows.get(split, {}).values()):,}",
                "rows": f"{card.get('packed', {}).get(split, 0):,}",
                "tokens": f"{counts.get('all', 0):,}",
                "supervised": f"{counts.get('supervised', 0):,}",
                "fill": f"{counts.get('all', 0) / room:.1%}" if room else "-",
                "fates": ", ".join(f"{fate} {count:,}" for fate, count in rows.get(split, {}).items()) or "-",
            }
        )
    leaks = card.get("leaks", {})
    return {
        "source": f"{card['source']['rows']:,} rows from {files(card['source']['files'])}",
        "fingerprint": str(card.get("fingerprint", ""))[:12],
        "splits": splits,
        "lengths": _lengths(card),
        "histogram": list(_histogram(card.get("lengths", {}).get("histogram", {}))),
        "facts": [
            (name, fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False))
            for name, fact in card.get("task", {}).items()
        ],
        "labels": _label_counts(card.get("labels", {})),
        "leaks": [_leak(kind, leaks[kind]) for kind in ("exact", "near") if kind in leaks],
        "copies": {split: f"{count:,}" for split, count in leaks.get("exact", {}).get("within", {}).items()},
        "fates": [
            {"fate": fate, "places": [f"{place['source']} row {place['row']:,}" for place in places]}
            for fate, places in card.get("examples", {}).items()
        ],
    }


def _lengths(card: Mapping[str, Any]) -> str:
    """Tokens a document, and what was cut off."""
    found = card.get("lengths", {})
    names = {"min": "min", "median": "median", "p95": "95 % up to", "max": "max"}
    told = [f"{title} {found[name]:,}" for name, title in names.items() if name in found]
    cuts = [
        f"cut off {split}: {its['tokens']:,} tokens in {its['documents']:,} documents"
        for split, its in card.get("cut", {}).items()
    ]
    return "; ".join([", ".join(told), *cuts])


def _histogram(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Documents by length, a line each power of two; without the empty ones before the first."""
    edges, counts = found.get("edges", []), found.get("counts", [])
    most, begun = max(counts, default=0), False
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        begun = begun or count > 0
        if begun:
            yield {
                "range": f"{low:,} to {high - 1:,}",
                "count": f"{count:,}",
                "percent": round(100 * count / max(1, most), 1),
            }


def _label_counts(labels: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of each label by split, with their shares; the most common labels of training first."""
    found = {split: counts for split, counts in labels.get("rows", {}).items() if sum(counts.values())}
    if not labels.get("names") or not found:
        return None
    totals = {split: sum(counts.values()) for split, counts in found.items()}
    names = sorted(
        dict.fromkeys(name for counts in found.values() for name in counts),
        key=lambda name: [-counts.get(name, 0) for counts in found.values()],
    )
    rows = [
        (
            name,
            [
                (f"{counts.get(name, 0):,}", f"{counts.get(name, 0) / totals[split]:.1%}")
                for split, counts in found.items()
            ],
        )
        for name in names[:LISTED_CLASSES]
    ]
    return {"splits": list(found), "rows": rows, "hidden": max(0, len(names) - LISTED_CLASSES)}


def _leak(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [
        {
            "similarity": f"{pair['similarity']:.2f}",
            **{
                side: f"{pair[side]['split']}: {pair[side]['source']} row {pair[side]['row']:,}"
                for side in ("first", "second")
            },
            "text": cut(str(pair["second"].get("text", "")), 300),
        }
        for pair in found.get("listed", [])[:10]
    ]
    title = "Exact copies across splits" if kind == "exact" else "Nearly the same across splits"
    documents = found.get("documents", 0)
    return {"title": title, "found": documents > 0, "documents": f"{documents:,}", "pairs": pairs}


def decisions(facts: Facts) -> list[dict[str, str]]:
    """What was left to ``auto``, or set, and why."""
    found = facts.resolved.get("decisions")
    return [
        {"key": key, "value": str(its.get("value")), "reason": str(its.get("reason", ""))}
        for key, its in (found.items() if isinstance(found, dict) else ())
        if isinstance(its, dict)
    ]


def settings_beyond(facts: Facts) -> list[str]:
    """The settings as run that the job file does not say: those that came with ``--set``, as one gives them there."""
    if facts.job is None or not facts.job_text:
        return []
    try:
        read = Job.load(facts.run.job).dump()
    except (DistftError, OSError):
        return []
    now, before = flat(facts.job.dump()), flat(read)
    changed = {key: value for key, value in now.items() if key != "name" and before.get(key) != value}
    return [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in changed.items()]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and all(re.fullmatch(r"[a-z_]+", str(name)) for name in value):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found

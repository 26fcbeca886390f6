"""``--set dotted.key=value``: one value of the job file replaced, or one that it lacks given."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distft.config.document import Document, Mark, compose, plain
from distft.config.problems import InvalidJob, Path, Problem


def override(document: Document, settings: Sequence[str]) -> Document:
    """The document with each ``dotted.key=value`` applied in turn; values are YAML, so ``null`` is null.

    Problems with a setting, now or in validation, name the setting in place of a line.
    """
    values: dict[str, Any] = copy.deepcopy(dict(document.values))
    marks, problems = dict(document.marks), list(document.problems)
    for setting in settings:
        where = f"--set {setting}"
        try:
            path, value, written, wrong = _parse(setting, where)
        except InvalidJob as error:
            problems += [replace(problem, where=where, line=None) for problem in error.problems]
            continue
        problems += wrong
        new = put(values, path, value)
        marks = {place: mark for place, mark in marks.items() if place[: len(new)] != new}
        marks |= {path[:length]: Mark(where) for length in range(len(new), len(path))}
        marks |= {place: Mark(where, None, mark.written) for place, mark in written.items()}
    return replace(document, values=values, marks=marks, problems=tuple(problems))


def _parse(setting: str, where: str) -> tuple[Path, Any, dict[Path, Mark], list[Problem]]:
    """The path, the value, how its parts were written, and what is wrong with them."""
    key, equals, text = setting.partition("=")
    path = _path(key.strip())
    if not equals or not all(path):
        fix = "write it as --set train.learning_rate=1e-5"
        raise InvalidJob([Problem(where, None, "", setting, "is no dotted.key=value", fix)])
    node = compose(text, where)
    if node is None:
        return path, None, {path: Mark(where, None, "null")}, []
    value, marks, problems = plain(node, where, path)
    return path, value, marks, [replace(problem, where=where, line=None) for problem in problems]


def _path(key: str) -> Path:
    """The parts of a dotted key; what a search varies is one part, though it has dots itself."""
    parts = key.split(".")
    if parts[:2] == ["search", "space"] and len(parts) > 2:
        return ("search", "space", ".".join(parts[2:]))
    return tuple(parts)


def put(values: dict[str, Any], path: Path, value: Any) -> Path:
    """Puts a value into nested mappings; whatever is no mapping on the way there becomes one.

    Returns:
        The path of the outermost value that is not what it was.
    """
    new = path
    for depth, part in enumerate(path[:-1], start=1):
        if not isinstance(values.get(str(part)), dict):
            values[str(part)] = {}
            new = min(new, path[:depth], key=len)
        values = values[str(part)]
    values[str(path[-1])] = value
    return new

"""Text with columns in braces: ``"Translate: {en}"``; ``{{`` and ``}}`` stand for the braces themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


class Part(NamedTuple):
    """A stretch of a template.

    Attributes:
        text: What it says, or the name of the column whose value stands there.
        is_column: Which of the two.
    """

    text: str
    is_column: bool


def parts(template: str) -> tuple[Part, ...]:
    """The stretches of a template, in order.

    Raises:
        ValueError: A brace has no partner, or names no column; the message says which.
    """
    found = []
    for match in _TOKEN.finditer(template):
        token = match[0]
        if token in {"{{", "}}"}:
            found.append(Part(token[0], False))
        elif token in {"{", "}"}:
            raise ValueError(f"the {token} at character {match.start() + 1} has no partner")
        elif match[1] is None:
            found.append(Part(token, False))
        elif match[1].strip() and "\n" not in match[1]:
            found.append(Part(match[1].strip(), True))
        else:
            raise ValueError(f"{token!r} at character {match.start() + 1} names no column")
    return tuple(found)


def columns(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once, in order."""
    return tuple(dict.fromkeys(part.text for part in parts(template) if part.is_column))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each column's value in its place; values are taken as they are, braces and all."""
    return "".join(values[part.text] if part.is_column else part.text for part in parts(template))

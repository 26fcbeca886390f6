"""Which names a glob means, and what is near a name that is not there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

GLOB = re.compile(r"[*?\[]")
_NEAR_NAMES = 5


def fixed_folder(pattern: str) -> str:
    """The part of a ``/``-separated pattern that is no pattern: ``data`` of ``data/*/rows.csv``."""
    parts = pattern.split("/")
    first = next(place for place, part in enumerate(parts) if GLOB.search(part))
    return "/".join(parts[:first])


def advice(wanted: str, names: Iterable[str], place: str) -> str:
    """What to look at where nothing matches: the names in ``place`` that are near the wanted one."""
    names = list(names)
    by_last = {name.rsplit("/", 1)[-1]: name for name in names}
    near = difflib.get_close_matches(wanted.rsplit("/", 1)[-1], list(by_last), n=_NEAR_NAMES, cutoff=0.5)
    shown = [by_last[name] for name in near] or names[:_NEAR_NAMES]
    return f"looked in {place}" + (f"; near it: {', '.join(shown)}" if shown else ", which is empty")


def glob_matches(pattern: str, name: str) -> bool:
    """Whether a ``/``-separated name matches a glob in which ``**`` stands for any number of folders.

    Python has this from 3.13 as ``PurePath.full_match``; remove when 3.13 is the oldest we support.
    """
    parts: list[str] = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|[^*?\[]+|\[", pattern):
        match token:
            case "**/":
                parts.append("(?:[^/]+/)*")
            case "**":
                parts.append(".*")
            case "*":
                parts.append("[^/]*")
            case "?":
                parts.append("[^/]")
            case _ if token.startswith("[") and len(token) > 1:
                inner = token[1:-1].replace("\\", r"\\").replace("[", r"\[")
                parts.append(f"[^{inner[1:]}/]" if inner.startswith("!") else f"[{inner}]")
            case _:
                parts.append(re.escape(token))
    return re.fullmatch("".join(parts), name, re.DOTALL) is not None

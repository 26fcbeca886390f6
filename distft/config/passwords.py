"""Passwords and keys that stand in a job: what a run keeps, and a cluster shows, would hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from distft.config.problems import Problem

if TYPE_CHECKING:
    from distft.config.document import Document

SECRET = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|\bhf_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}|\bsk-[\w-]{20,}"
)
"""A password in an address, and keys of the Hugging Face hub, AWS, GitHub and OpenAI."""


def passwords(document: Document, settings: Sequence[str]) -> Iterator[Problem]:
    """Lines of a job file, its comments too, and settings that hold what looks like a secret; none is repeated.

    Args:
        document: The file.
        settings: ``dotted.key=value``, as for ``--set``.
    """
    lines: list[tuple[str, int | None, str]] = [
        (f"{document.name}:{number}", number, line) for number, line in enumerate(document.text.splitlines(), start=1)
    ]
    lines += [(f"--set {setting.partition('=')[0]}", None, setting) for setting in settings]
    for where, number, line in lines:
        if SECRET.search(line):
            message = "this looks like a secret, which the run's folder would keep and a cluster would show"
            fix = "put it into the environment where the job runs: HF_TOKEN, AWS_SECRET_ACCESS_KEY, "
            yield Problem(where, number, "", None, message, fix + "MLFLOW_TRACKING_USERNAME and _PASSWORD ...")

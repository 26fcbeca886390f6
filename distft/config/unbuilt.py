"""What the job file can say and distft cannot do yet: refused, never ignored. Whoever builds a thing deletes its line.

A value equal to what happens anyway is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from distft.config.problems import Finding

if TYPE_CHECKING:
    from distft.config.job import Job


class Unbuilt(NamedTuple):
    """One thing that is not built yet."""

    key: str
    """The key that asks for it, dotted."""
    when: Callable[[Job], bool]
    """Whether a job asks for it."""
    what: str
    """What it is."""
    instead: str
    """What there is in its place."""


UNBUILT = (
    Unbuilt("model.dtype", lambda job: job.model.dtype == "fp16", "fp16", "use auto, bf16 or fp32"),
    Unbuilt("zero.offload", lambda job: job.zero.offload == "nvme", "offload to nvme", "use none or cpu"),
)


def unbuilt(job: Job) -> Iterator[Finding]:
    """What a job asks for that is not built yet."""
    for entry in UNBUILT:
        if entry.when(job):
            path = tuple(entry.key.split("."))
            yield Finding(path, f"not built yet ({entry.what})", entry.instead)

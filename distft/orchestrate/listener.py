"""Who is told how a run goes."""

from __future__ import annotations

from typing import Any, Protocol

from distft.tuning.progress import SearchProgress


class Listener(Protocol):
    """Who is told how a run goes: a terminal, a log, nobody."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def progress(self, done: int, of: int) -> None:
        """So many parts of the stage are done."""

    def record(self, record: dict[str, Any]) -> None:
        """A new line of ``metrics.jsonl``."""

    def trials(self, progress: SearchProgress) -> None:
        """The trials of a search, whenever one of them changes."""


class Silent:
    """Tells nobody."""

    def stage(self, name: str) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def progress(self, done: int, of: int) -> None:
        """Says nothing."""

    def record(self, record: dict[str, Any]) -> None:
        """Says nothing."""

    def trials(self, progress: SearchProgress) -> None:
        """Says nothing."""


SILENT = Silent()

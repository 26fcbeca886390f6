"""How training ended."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """How training ended; it crosses processes.

    Attributes:
        step: Updates made.
        best_step: The validated step with the lowest loss, or None.
        interrupted: Whether it stopped because somebody asked it to.
        metrics: The last training loss, and the best validation loss where there is one.
    """

    step: int
    best_step: int | None
    interrupted: bool
    metrics: dict[str, float] = field(default_factory=dict)

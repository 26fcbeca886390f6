"""The training loop, its schedule and its reports; it knows neither Ray nor DeepSpeed."""

from __future__ import annotations

from distft.train.outcome import Attempt, Outcome

__all__ = ["Attempt", "Outcome"]

"""How far a run has come: what a checkpoint remembers of training beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Updates made.
        best_step: The validated step with the lowest loss, or None.
        best_loss: Its validation loss.
        validations_without_gain: Validations since.
        skipped_steps: Steps that are left out because their loss was not a number, in order.
    """

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    validations_without_gain: int = 0
    skipped_steps: tuple[int, ...] = ()

    def validated(self, loss: float) -> Progress:
        """After a validation at this step."""
        if self.best_loss is None or loss < self.best_loss:
            return replace(self, best_step=self.step, best_loss=loss, validations_without_gain=0)
        return replace(self, validations_without_gain=self.validations_without_gain + 1)

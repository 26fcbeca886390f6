"""Which checkpoints stay, within a budget of bytes that the write in progress counts towards."""

from __future__ import annotations

from collections.abc import Sequence

from distft.checkpoint.layout import Checkpoint
from distft.config.values import amount
from distft.errors import CapacityError


def obsolete(checkpoints: Sequence[Checkpoint], budget_bytes: int, incoming_bytes: int) -> list[Checkpoint]:
    """The oldest checkpoints that must go so that another fits.

    The newest one, and the best as the newest knows it, never go.

    Args:
        checkpoints: The complete ones, newest first.
        budget_bytes: What all may take together.
        incoming_bytes: What the next one takes.

    Raises:
        CapacityError: It does not fit beside those two.
    """
    total = incoming_bytes + sum(checkpoint.bytes for checkpoint in checkpoints)
    going = []
    for checkpoint in spare(checkpoints):
        if total <= budget_bytes:
            break
        going.append(checkpoint)
        total -= checkpoint.bytes
    if total > budget_bytes:
        raise _too_small(
            budget_bytes, total, f"a checkpoint takes {amount(incoming_bytes)} beside the newest and the best"
        )
    return going


def spare(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that may go, oldest first: all but the newest, and the best as the newest knows it.

    Args:
        checkpoints: The complete ones, newest first.
    """
    if not checkpoints:
        return []
    kept = {checkpoints[0].step, checkpoints[0].state.best_step}
    return [checkpoint for checkpoint in reversed(checkpoints) if checkpoint.step not in kept]


def check_budget(budget_bytes: int, checkpoint_bytes: int, *, validated: bool) -> None:
    """Refuses, before training, a budget that will not do.

    Args:
        budget_bytes: What all checkpoints may take together.
        checkpoint_bytes: What one takes.
        validated: Whether a best checkpoint is kept beside the newest.

    Raises:
        CapacityError: The newest, the best and one being written do not fit at once.
    """
    needed = checkpoint_bytes * (3 if validated else 2)
    if needed > budget_bytes:
        kept = "the newest, the best" if validated else "the newest"
        reason = f"a checkpoint takes about {amount(checkpoint_bytes)}, and {kept} and one being written exist at once"
        raise _too_small(budget_bytes, needed, reason)


def _too_small(budget_bytes: int, needed: int, reason: str) -> CapacityError:
    return CapacityError(
        f"a budget of {amount(budget_bytes)} is too small: {reason}",
        where="checkpoint.budget",
        fix=f"give it at least {amount(needed)}",
    )

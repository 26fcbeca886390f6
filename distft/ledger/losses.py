"""The losses of single rows, as training left them in the run's folder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distft.ledger.plan import Plan
from distft.runs import Run


def recorded_losses(run: Run, plan: Plan, step: int) -> NDArray[np.float32] | None:
    """The sum of token losses of each of a step's rows, (B,) in the plan's order; None where they were not written.

    Args:
        run: The run.
        plan: Its plan.
        step: The step, from 1 to the last planned one.
    """
    order = plan.order
    count = min(order.batch_size, order.total_rows - (step - 1) * order.batch_size)
    if not run.row_losses.exists():
        return None
    with run.row_losses.open("rb") as file:
        file.seek(4 * (step - 1) * order.batch_size)
        content = file.read(4 * count)
    losses = np.frombuffer(content[: len(content) // 4 * 4], dtype="<f4")
    return losses if len(losses) == count else None

"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, total: int, peak: float, kind: Kind, warmup: float) -> float:
    """The learning rate of an update.

    It rises linearly over the first ``round(warmup * total)`` updates and then falls to zero, after the last update,
    along half a cosine (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, without restarts) or a line, or stays.

    Args:
        step: The update, 1 .. total.
        total: Updates of the run.
        peak: The highest rate.
        kind: The shape after warm-up.
        warmup: The part of the run that warms up, 0 .. 1.
    """
    rising = round(warmup * total)
    if step <= rising:
        return peak * step / rising
    if kind == "constant":
        return peak
    done = (step - 1 - rising) / max(1, total - rising)
    if kind == "linear":
        return peak * (1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))

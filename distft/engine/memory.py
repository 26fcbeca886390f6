"""How much memory this process has used at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """The most memory allocated on the device, or on a CPU the most that the process held in RAM (ru_maxrss)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""Logging: one logger for the package, and one place that quietens other libraries' chatter."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("distft")


def quieten_libraries() -> None:
    """Keeps what libraries say on import, and their progress bars, from a person's terminal; errors still show.

    To be called before they are imported. Workers do not call it: what they print goes to the run's logs.
    """
    # transformers imports DeepSpeed where it is installed, which tells that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # peft imports bitsandbytes where it is installed, which misses faster kernels for inference on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

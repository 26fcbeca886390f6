"""distft fine-tunes GPT-style language models on a Ray cluster with DeepSpeed ZeRO.

The command line's verbs in Python::

    from distft import Job, run, generate

    finished = run(Job.load("job.yaml"))
    print(finished.folder, "".join(generate(finished, "Once upon a time")))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.config import Job
    from distft.orchestrate.results import evaluate
    from distft.orchestrate.run import run, search
    from distft.orchestrate.serving.server import serve
    from distft.orchestrate.writing import generate
    from distft.runs import Run

__all__ = ["Job", "Run", "evaluate", "generate", "run", "search", "serve"]
__version__ = "0.1.0"


_HOMES = {
    "Job": "distft.config",
    "Run": "distft.runs",
    "evaluate": "distft.orchestrate.results",
    "generate": "distft.orchestrate.writing",
    "run": "distft.orchestrate.run",
    "search": "distft.orchestrate.run",
    "serve": "distft.orchestrate.serving.server",
}


def __getattr__(name: str) -> Any:
    """Imports a name's room when it is first asked for: ``import distft`` itself is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

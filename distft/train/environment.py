"""What a run ran on: versions, devices, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from distft.plan.hardware import processor

PACKAGES = ("distft", "torch", "ray", "deepspeed", "transformers", "tokenizers", "pyarrow", "numpy")


def environment() -> dict[str, Any]:
    """Facts for ``environment.json``; none of them is secret, and no environment variable is copied."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """The versions of what trains, by package; without those that are not installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The commit of this checkout of distft; None where it was installed as a package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

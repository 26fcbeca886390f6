"""What a run ran on: versions, devices, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("distft", "torch", "ray", "deepspeed", "transformers", "tokenizers", "pyarrow", "numpy")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment() -> dict[str, Any]:
    """Facts for ``environment.json``; none of them is secret, and no environment variable is copied."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
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


def _processor() -> str:
    """Its name, and which of the instructions it has that decide how fast it trains: ``AMD EPYC (avx2, avx512f)``."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        return platform.processor()
    # The first core stands for all. Other architectures name other things.
    lines = (line.partition(":") for line in facts.read_text(errors="replace").partition("\n\n")[0].splitlines())
    told = {name.strip(): value.strip() for name, _, value in lines}
    has = [name for name in _INSTRUCTIONS if name in told.get("flags", "").split()]
    return told.get("model name", platform.processor()) + (f" ({', '.join(has)})" if has else "")


def _commit() -> str | None:
    """The commit of this checkout of distft; None where it was installed as a package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

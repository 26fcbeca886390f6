"""Times and sizes as a person reads them, and words that may be shown to others."""

from __future__ import annotations

import re
import time


def duration(seconds: float) -> str:
    """``8 ms``, ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if 0 < seconds < 0.05:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """``812 bytes``, ``5.2 kB``, ``1.6 GB``: powers of ten."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} bytes"


def moment(seconds: float) -> str:
    """``2026-11-24 03:22 UTC``: the same words wherever it is read."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else "unknown"


def without_passwords(text: str) -> str:
    """Addresses without the name and password that may stand in them: pages are passed on."""
    return re.sub(r"(\w://)[^/\s@'\"]*:[^/\s@'\"]*@", r"\1***@", text)

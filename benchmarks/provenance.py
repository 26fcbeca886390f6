"""What a measurement was made on: without it a figure is a rumour."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from distft.train.environment import environment


def provenance(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Commit, processor, cores, memory, load of the machine, versions and date, as plain values.

    Args:
        packages: Distributions whose versions are told beside the usual ones.
    """
    facts = environment()
    for name in packages:
        try:
            facts["versions"][name] = version(name)
        except PackageNotFoundError:
            facts["versions"][name] = None
    return {
        **facts,
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

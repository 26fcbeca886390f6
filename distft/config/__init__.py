"""The job file: read, checked as a whole, frozen. It imports neither torch nor Ray, so that it answers at once.

The names are imported when first asked for: what an address means is told without pydantic
(:mod:`distft.config.addresses`), which a machine that only measures may lack.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.config.files import check, relative_files
    from distft.config.job import Job
    from distft.config.problems import InvalidJob, Problem, UnusableFiles
    from distft.config.search import SearchSection
    from distft.config.sections import (
        AdapterSection,
        CheckpointSection,
        ClusterSection,
        DataSection,
        EvaluateSection,
        ModelSection,
        ScheduleSection,
        ServeSection,
        SourcesSection,
        SplitsSection,
        TaskSection,
        TrackSection,
        TrainSection,
        ZeroSection,
    )
    from distft.config.values import Bounds, Every, Steps

_HOMES = {
    "AdapterSection": "sections",
    "Bounds": "values",
    "CheckpointSection": "sections",
    "ClusterSection": "sections",
    "DataSection": "sections",
    "EvaluateSection": "sections",
    "Every": "values",
    "InvalidJob": "problems",
    "Job": "job",
    "ModelSection": "sections",
    "Problem": "problems",
    "ScheduleSection": "sections",
    "SearchSection": "search",
    "ServeSection": "sections",
    "SourcesSection": "sections",
    "SplitsSection": "sections",
    "Steps": "values",
    "TaskSection": "sections",
    "TrackSection": "sections",
    "TrainSection": "sections",
    "UnusableFiles": "problems",
    "ZeroSection": "sections",
    "check": "files",
    "relative_files": "files",
}

__all__ = [
    "AdapterSection",
    "Bounds",
    "CheckpointSection",
    "ClusterSection",
    "DataSection",
    "EvaluateSection",
    "Every",
    "InvalidJob",
    "Job",
    "ModelSection",
    "Problem",
    "ScheduleSection",
    "SearchSection",
    "ServeSection",
    "SourcesSection",
    "SplitsSection",
    "Steps",
    "TaskSection",
    "TrackSection",
    "TrainSection",
    "UnusableFiles",
    "ZeroSection",
    "check",
    "relative_files",
]


def __getattr__(name: str) -> Any:
    """Imports a name's module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"distft.config.{_HOMES[name]}"), name)

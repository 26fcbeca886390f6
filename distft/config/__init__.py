"""The job file: read, checked as a whole, frozen. It imports neither torch nor Ray, so that it answers at once."""

from __future__ import annotations

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

"""Preparing data as Ray Data tasks: each unit of work is one task, somewhere on the cluster.

The files that tasks write lie under the cache folder, which all nodes of a cluster must see under the same path.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.data.documents import Unit
from distft.data.prepare import Progress, prepared_folder
from distft.data.units import Report
from distft.task.prepare import task_of


def prepare(job: Job, model_folder: Path, progress: Progress | None = None) -> Path:
    """The folder of the job's prepared data; where it must be built, on the Ray cluster this process is connected to.

    Where it is there already, Ray is not touched.

    Raises:
        DataError: The data cannot be used as it is.
        CapacityError: The disk is full.
    """
    return prepared_folder(job, model_folder, lambda: task_of(job, model_folder), on_ray, progress)


def on_ray(units: Mapping[int, Unit], do: Callable[[int, Unit], Report]) -> Iterator[Report]:
    """Does each unit as a Ray Data task of one CPU; reports come as they are done."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that progress bars are off

    def one(item: dict[str, Any]) -> dict[str, bytes]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tasks are the parallelism: one thread for each
        return {"report": pickle.dumps(do(item["number"], pickle.loads(item["unit"])))}

    items = [{"number": number, "unit": pickle.dumps(unit)} for number, unit in units.items()]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(one)
    for row in dataset.iter_rows():
        yield pickle.loads(row["report"])

"""What a run works on: the model's folder and the prepared rows' folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distft.config import Job
from distft.orchestrate.listener import SILENT, Listener


@dataclasses.dataclass(frozen=True)
class Data:
    """What preparation leaves: the model's folder and the prepared rows' folder."""

    model: Path
    prepared: Path


def prepare(job: Job, listener: Listener = SILENT) -> Data:
    """Fetches the model and prepares the rows, from the cache where they are known; a cluster must be connected."""
    from distft.data.card import describe
    from distft.model import materialise
    from distft.orchestrate.prepare import prepare as prepare_on_cluster

    listener.stage("model")
    model = materialise(job.model, job.folder)
    listener.stage("data")
    data = Data(model, prepare_on_cluster(job, model, listener.progress))
    listener.note(describe(card_of(data)))
    return data


def card_of(data: Data) -> dict[str, Any]:
    """The data card."""
    from distft.data.store import Prepared

    return Prepared.open(data.prepared).card

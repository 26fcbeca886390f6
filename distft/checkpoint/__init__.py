"""Checkpoints: one folder each, trusted only when its last file, COMPLETE, is there and agrees with the others.

::

    checkpoints/step-000100/
      zero/...        the shards, each written by its rank
      COMPLETE        JSON, written last: how training stood, and every file's bytes and sha256
"""

from __future__ import annotations

from distft.checkpoint.layout import (
    Checkpoint,
    State,
    best,
    checkpoints_folder,
    complete,
    newest_sound,
    verify,
    withdraw_after,
)
from distft.checkpoint.retention import check_budget, obsolete
from distft.checkpoint.save import save

__all__ = [
    "Checkpoint",
    "State",
    "best",
    "check_budget",
    "checkpoints_folder",
    "complete",
    "newest_sound",
    "obsolete",
    "save",
    "verify",
    "withdraw_after",
]

"""Checkpoints: one folder each, trusted only when its last file, COMPLETE, is there and agrees with the others.

::

    checkpoints/step-000100/
      w2-5f0c…/rank-00000.safetensors     what each rank held (:mod:`distft.checkpoint.shards`)
      w2-5f0c…/rank-00001.safetensors
      COMPLETE                            JSON, written last and signed: how training stood, every file's bytes, sha256
"""

from __future__ import annotations

from distft.checkpoint.layout import (
    Checkpoint,
    State,
    best,
    complete,
    newest_sound,
    sound,
    verify,
    withdraw_after,
)
from distft.checkpoint.retention import check_budget, obsolete, spare
from distft.checkpoint.save import Saver, shared_key
from distft.checkpoint.shards import Shards, weights
from distft.checkpoint.signature import signing_key
from distft.checkpoint.storage import Folder, Storage, Unsound, storage_of

__all__ = [
    "Checkpoint",
    "Folder",
    "Saver",
    "Shards",
    "State",
    "Storage",
    "Unsound",
    "best",
    "check_budget",
    "complete",
    "newest_sound",
    "obsolete",
    "shared_key",
    "signing_key",
    "sound",
    "spare",
    "storage_of",
    "verify",
    "weights",
    "withdraw_after",
]

"""Only what this run has written is loaded: COMPLETE is signed with a key that is never beside the checkpoints."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from typing import Any

from distft.checkpoint.storage import Storage
from distft.errors import CheckpointError
from distft.runs import Run

_KEY = re.compile(r"[0-9a-f]{64}")


def signing_key(run: Run, storage: Storage) -> bytes:
    """The run's key, made where the run has neither key nor checkpoints; called by one process, rank 0.

    Raises:
        CheckpointError: There are checkpoints, and the key is gone.
    """
    try:
        text = run.key.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        text = ""
    if not _KEY.fullmatch(text):
        if any(name.endswith("/COMPLETE") for name in storage.sizes()):
            raise CheckpointError(
                f"there are checkpoints in {storage}, and the key that signed them is gone",
                where=str(run.key),
                fix="put it back from a copy of the run's folder, or start a new run with another --name",
            )
        text = secrets.token_hex(32)
        _write(run, text)
    return bytes.fromhex(text)


def _write(run: Run, text: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    temporary = run.key.with_name(f".{run.key.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(descriptor)
    temporary.replace(run.key)


def signature(document: Mapping[str, Any], key: bytes) -> str:
    """HMAC-SHA256 (RFC 2104) of a JSON document in its canonical form, hexadecimal."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, canonical.encode(), hashlib.sha256).hexdigest()


def is_signed(document: Mapping[str, Any], said: object, key: bytes) -> bool:
    """Whether a signature is this document's."""
    return isinstance(said, str) and hmac.compare_digest(signature(document, key).encode(), said.encode())

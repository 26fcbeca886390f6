"""What an export shares with others: the base that it is an adapter of, known by a hash. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from distft.certificate.compare import Finding, compare
from distft.certificate.identity import Identity, identity
from distft.certificate.record import FILE, Certificate, Reply
from distft.runs import read_json
from distft.source import sha256_of

ADAPTER = "adapter"
"""The folder beside a merged model that holds its adapter alone."""
BASE = "base_weights"
"""In ``distft.json``: the hash of the weights beneath the adapter, where the two are all of the model."""


def base_of(folder: Path) -> str | None:
    """What model an export's adapter belongs to, as a word: a hash of its weights, and the dtype that they are used in.

    None where the export is served with weights of its own: all were trained, or the adapter is not there any more, or
    it needs more than the base (DoRA, four bits, a classifier's head). A base is its own.
    """
    values = read_json(folder / FILE)
    listed = _files(values.get("sha256", {}))
    if BASE not in values or not all((folder / name).is_file() for name in listed):
        return None
    return f"{values[BASE]}-{values['dtype']}"


def has_adapter(folder: Path) -> bool:
    """Whether an export is an adapter over its base; else it is the base itself."""
    return bool(_files(read_json(folder / FILE)["sha256"]))


def compare_adapted(certificate: Certificate, replies: Sequence[Reply], folder: Path) -> list[Finding]:
    """What differs between the model that was trained and its adapter over a base whose hash is that of training.

    Args:
        certificate: What the trained model answered.
        replies: What the served one did.
        folder: The export; the merged weights in it are not looked at, since they are not served.
    """
    hashes = _files(read_json(folder / FILE)["sha256"])
    others = [name for name, known in hashes.items() if sha256_of(folder / name) != known]
    found = compare(certificate, replies, served_by(certificate, folder))
    if not others:
        return found
    seen = [one.what for one in found if one.reason in ("weights", "adapter", "dtype")]
    what = "; ".join([f"{', '.join(others)} is another than was exported", *seen])
    return [Finding("adapter", what), *(one for one in found if one.what not in seen)]


def served_by(certificate: Certificate, folder: Path) -> Identity:
    """What is served where the weights are a base's and an adapter's: theirs are those of training, by other hashes."""
    return dataclasses.replace(identity(folder, weights=False), tensors=certificate.identity.tensors)


def _files(hashes: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in hashes.items() if name.startswith(f"{ADAPTER}/")}

"""What a certificate holds, and its place in ``distft.json``.

T: tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.certificate.identity import Identity
from distft.errors import JobError
from distft.runs import read_json

FILE = "distft.json"
KEY = "parity"
"""Where the certificate stands in the file."""

NEW_TOKENS = 32
"""The most tokens of an answer that are recorded."""
BEYOND_STOP = 8
"""So many tokens more are asked for where the trained model stops: a server that does not stop is seen to go on."""


@dataclass(frozen=True)
class Ask:
    """What a client sends, and the ids that the model must read.

    Attributes:
        ids: The token ids of the prompt.
        prompt: A text to continue or to classify.
        messages: A conversation for the template. Where both are None, the ids themselves are sent.
    """

    ids: tuple[int, ...]
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Record:
    """A prompt and what the training engine answers.

    Attributes:
        ask: The prompt.
        tokens: The likeliest tokens one after the other, (T,), with the one that stops the answer.
        logprobs: Their log-probabilities in nats, (T,).
        gaps: By how much each leads over the second likeliest, in nats, (T,).
        stopped: Whether the last of them stops the answer.
        labels: What a classifier says: the log-probability of each label.
        bare: The likeliest token at each place after the same tokens, and its log-probability, where the adapter is
            left out, (T,); empty where there is no adapter.
        bare_labels: The same for a classifier.
    """

    ask: Ask
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()
    stopped: bool = False
    labels: dict[str, float] = field(default_factory=dict)
    bare: tuple[tuple[int, float], ...] = ()
    bare_labels: dict[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> int:
        """Tokens to ask for."""
        return len(self.tokens) + (BEYOND_STOP if self.stopped else 0)


@dataclass(frozen=True)
class Reply:
    """What a served model made of a prompt.

    Attributes:
        ids: The ids that it read; None where it does not tell them.
        length: How many it read; None where it does not tell that.
        tokens: The tokens that it wrote, (T,), with or without the one that stopped it.
        logprobs: Their log-probabilities in nats, (T,); empty where it does not tell them.
        stopped: Whether it stopped by itself, rather than at the limit.
        labels: What a classifier says: the log-probability of each label.
        refused: What it said where it refused the prompt.
    """

    ids: tuple[int, ...] | None = None
    length: int | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    stopped: bool = False
    labels: dict[str, float] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Certificate:
    """What a served model is held against.

    Attributes:
        run: The run's name.
        kind: The job's ``task.kind``.
        dtype: In which training computed: ``bf16`` or ``fp32``.
        stops: The ids that end an answer.
        special: The ids of special tokens.
        identity: Of the folder that was exported.
        records: Prompts and answers.
    """

    run: str
    kind: str
    dtype: str
    stops: tuple[int, ...]
    special: tuple[int, ...]
    identity: Identity
    records: tuple[Record, ...]


def as_json(stops: tuple[int, ...], special: tuple[int, ...], identity: Identity, records: tuple[Record, ...]) -> Any:
    """What stands under :data:`KEY`; what a record lacks is left out."""
    return {
        "stops": list(stops),
        "special": list(special),
        "weights": identity.weights,
        "identity": asdict(identity),
        "records": [
            {"ask": _filled(asdict(record.ask)), **{k: v for k, v in _filled(asdict(record)).items() if k != "ask"}}
            for record in records
        ],
    }


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value not in ((), {})}


def read(place: Path) -> Certificate:
    """The certificate of an export.

    Args:
        place: The export's folder, a copy of it, or a file beside the copy of its ``distft.json``.

    Raises:
        JobError: There is none, or none with prompts: it was exported by an older distft.
    """
    path = (place if place.is_dir() else place.parent) / FILE
    again = "write it again: distft export RUN"
    if not path.is_file():
        raise JobError(
            f"there is no {FILE}, which says what the model must answer",
            where=str(path.parent),
            fix="name the run that it comes from: distft export RUN --check PLACE",
        )
    values = read_json(path)
    if KEY not in values:
        raise JobError(
            "the export has no parity certificate: it is older than this distft, or its data was gone",
            where=str(path),
            fix=again,
        )
    found: Mapping[str, Any] = values[KEY]
    try:
        return Certificate(
            values["run"],
            values["task"],
            values["dtype"],
            tuple(found["stops"]),
            tuple(found["special"]),
            Identity(**found["identity"]),
            tuple(map(_record, found["records"])),
        )
    except (KeyError, TypeError) as error:
        raise JobError(f"the parity certificate cannot be read ({error!r})", where=str(path), fix=again) from error


def _record(values: Mapping[str, Any]) -> Record:
    ask = values["ask"]
    messages = ask.get("messages")
    return Record(
        Ask(tuple(ask["ids"]), ask.get("prompt"), None if messages is None else tuple(messages)),
        tuple(values.get("tokens", ())),
        tuple(values.get("logprobs", ())),
        tuple(values.get("gaps", ())),
        values.get("stopped", False),
        values.get("labels", {}),
        tuple((token, logprob) for token, logprob in values.get("bare", ())),
        values.get("bare_labels", {}),
    )

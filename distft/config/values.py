"""The kinds of value a job file holds: sizes, hashes, names, and how often something happens."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, model_validator
from pydantic_core import PydanticCustomError

UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", start=1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGTP", start=1)},
}
"""Bytes of each unit: KB, MB ... are powers of 1000; KiB, MiB ... powers of 1024."""

Metric = Literal[
    "loss",
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "macro_f1",
    "chrf",
    "bleu",
    "rouge1",
    "rouge2",
    "rougeL",
    "exact_match",
    "token_f1",
    "stop_rate",
    "length",
    "calibration_error",
]
"""Names of all metrics: those of the contract (section 1), length (tokens of an answer) and calibration_error."""


def wrong(expected: str, fix: str | None = None) -> PydanticCustomError:
    """The error of a value that is not what is expected; ``expected`` follows the words "must be"."""
    return PydanticCustomError("expected", "{expected}", {"expected": expected, "fix": fix})


def parse_bytes(size: str) -> int:
    """Bytes of a size such as ``20GB``, ``1.5 TB`` or ``500MiB``.

    Raises:
        PydanticCustomError: It is not a size; within validation pydantic collects it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTP]?i?B)", size.strip(), re.IGNORECASE | re.ASCII)
    found = int(Decimal(match[1]) * UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise wrong("a size such as 20GB, 1.5TB or 500MiB")
    return found


def amount(size: float) -> str:
    """Bytes as people read them, in powers of ten as on a disk's label."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def _size(size: object) -> object:
    parse_bytes(str(size))
    return size


def _sha256(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise wrong("64 hexadecimal digits", f"it has {len(digest)} characters; `sha256sum FILE` prints it")
    return digest.lower()


def _run_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise wrong("a folder's name: letters, digits, `.`, `_` and `-`, at most 100, the first no `.` or `-`")
    return name


def _filled(text: str) -> str:
    if not text.strip():
        raise wrong("text that is not empty")
    return text


Text = Annotated[str, AfterValidator(_filled)]
Size = Annotated[str, BeforeValidator(_size)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
RunName = Annotated[str, AfterValidator(_run_name)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of the job file: frozen, strict about types, and without room for keys it does not know."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Steps(Section):
    """Every so many optimizer steps."""

    steps: Count
    """Optimizer steps from one time to the next."""


class Every(RootModel[Annotated[float, Field(gt=0, le=1)] | Steps]):
    """How often something happens: a fraction of the run, or ``{steps: N}``."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _not_a_count(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
            fix = f"for every {value:g} steps write {{steps: {value:g}}}"
            raise wrong("a fraction of the run (above 0, at most 1) or {steps: N}", fix)
        return value

    def steps(self, total_steps: int) -> int:
        """Optimizer steps from one time to the next in a run of ``total_steps``: at least 1."""
        if isinstance(self.root, Steps):
            return self.root.steps
        return max(1, round(self.root * total_steps))


class Bounds(Section):
    """The least and the most of something that grows and shrinks."""

    min: Count
    """The least."""
    max: Count
    """The most."""

    def __str__(self) -> str:
        return f"{self.min} to {self.max}"


class Replicas(Bounds):
    """Copies of a served model; with a least of 0, the last one goes too while nobody asks."""

    min: Annotated[int, Field(ge=0)]
    """The least."""

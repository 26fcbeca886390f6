"""What pydantic found, in plain words: one finding for each mistake, however many types a key allows."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distft.config import keys
from distft.config.document import Document, below, show
from distft.config.problems import Finding, Path, choices, dotted

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "expected": "{expected}",
}
"""What a key must be, by the type of pydantic's error."""

YES_OR_NO = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
QUICK_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def explain(error: ValidationError, job: type[BaseModel], document: Document) -> list[Finding]:
    """One finding for each key that is wrong.

    Args:
        error: What pydantic found, one entry for each type that a key allows.
        job: The class that was validated.
        document: The values as they were written.
    """
    groups: dict[Path, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False, include_input=False):
        groups.setdefault(_path(details, document.values), []).append(details)
    inner = {path[:length] for path in groups for length in range(len(path))}
    findings, named = [], set()
    for path, details_of in groups.items():
        if path in inner:  # another type of this key came nearer to what was meant, and says what is wrong inside
            continue
        if any(details["type"] == "extra_forbidden" for details in details_of):
            advice, key = keys.meant(job, path)
            named.add(key)
            findings.append(Finding(path, "unknown key", advice))
        elif all(details["type"] == "missing" for details in details_of):
            findings.append(_missing(job, path))
        else:
            findings.append(_wrong(job, path, details_of, document))
    return [finding for finding in findings if not _follows(finding, named)]


def _path(details: ErrorDetails, values: Any) -> Path:
    """Where in the job file an error lies: its location without pydantic's names for the types of a union."""
    path: list[str | int] = []
    current, loc = values, details["loc"]
    for position, part in enumerate(loc):
        try:
            current = below(current, part)
        except LookupError:
            if position < len(loc) - 1 or details["type"] != "missing":
                continue
        path.append(part)
    return tuple(path)


def _follows(finding: Finding, named: set[str | None]) -> bool:
    """Whether a key is only missing because it was misspelt, which has been said already."""
    key = dotted(finding.path)
    return finding.message.startswith("missing") and any(
        name is not None and (key == name or key.startswith(f"{name}.")) for name in named
    )


def _missing(job: type[BaseModel], path: Path) -> Finding:
    """A required key is not there."""
    info = keys.field_at(job, path)
    return Finding(path, "missing, and required", _meaning(info.description) if info else None)


def _wrong(job: type[BaseModel], path: Path, details_of: list[ErrorDetails], document: Document) -> Finding:
    """A value is none of the types that its key allows, or out of range."""
    too_short = [details for details in details_of if details["type"] == "too_short"]
    expected = list(dict.fromkeys(_expected(details, job, path) for details in too_short or details_of))
    message = f"must be {' or '.join(expected)}, not {document.show(path)}"
    return Finding(path, message, _fix(job, path, details_of, document))


def _expected(details: ErrorDetails, job: type[BaseModel], path: Path) -> str:
    """What a value must be, as words that follow "must be"."""
    context = details.get("ctx", {})
    if details["type"] == "literal_error":
        return choices(_choices(details))
    if details["type"] in {"model_type", "model_attributes_type"}:
        names = [name for section in keys.sections_at(job, path) for name in section.model_fields]
        return f"a mapping with {', '.join(names)}"
    if details["type"] == "too_short" and context["field_type"] == "Dictionary":
        return f"a mapping with at least {context['min_length']} of them"
    if details["type"] in EXPECTED:
        return EXPECTED[details["type"]].format(**context)
    return f"otherwise ({details['msg']})"


def _choices(details: ErrorDetails) -> list[str]:
    """The words that an enumeration allows."""
    return re.findall(r"'([^']*)'", details.get("ctx", {}).get("expected", ""))


def _fix(job: type[BaseModel], path: Path, details_of: list[ErrorDetails], document: Document) -> str | None:
    """What to do about a wrong value: the nearest that is right, else what the key is for."""
    value, types = document.value(path), {details["type"] for details in details_of}
    advice: list[str] = [fix for details in details_of if (fix := details.get("ctx", {}).get("fix"))]
    if advice:
        return advice[0]
    words = [word for details in details_of if details["type"] == "literal_error" for word in _choices(details)]
    if near := difflib.get_close_matches(_word(value), words, n=1, cutoff=0.5):
        return f"did you mean {near[0]}?"
    if types & {"int_type", "float_type"} and isinstance(value, str) and QUICK_NUMBER.fullmatch(value.strip()):
        return "write it without quotation marks"
    if "int_type" in types and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    if "bool_type" in types and _word(value) in YES_OR_NO:
        return f"write {YES_OR_NO[_word(value)]}"
    if "string_type" in types and isinstance(value, bool | int | float):
        return f'put it in quotation marks: "{document.show(path)}"'
    info = keys.field_at(job, path)
    if types == {"model_type"} and not isinstance(value, list | None):
        first = next(iter(keys.sections_at(job, path)[0].model_fields))
        return f"did you mean {path[-1]}: {{{first}: {document.show(path)}}}?"
    if value is None and info is not None and not info.is_required():
        return f"remove the line for the default, {show(_default(info))}"
    return _meaning(info.description) if info else None


def _default(info: Any) -> Any:
    """A field's default as a plain value."""
    default = info.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _word(value: Any) -> str:
    """A value as somebody might have meant a word by it: null for none, False for no."""
    return (
        {None: "none", True: "yes", False: "no"}[value]
        if value is None or isinstance(value, bool)
        else str(value).lower()
    )


def _meaning(description: str | None) -> str | None:
    """What a key is for, from the documentation under its field."""
    if description is None:
        return None
    text = " ".join(description.split()).rstrip(".")
    return f"meaning: {text[0].lower() if text[1:2].islower() else text[0]}{text[1:]}"

"""The job file's reference: every key with what it takes, its default and its meaning, made from the fields themselves.

What a key takes is read from the JSON schema that pydantic makes of the job; its meaning is the line under its field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distft.config.job import Job

Schema = Mapping[str, Any]

TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
    "object": "mapping",
}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
#: How a key below a list's entries, or below names of one's own choice, is written.
ENTRY, NAME = "[]", "NAME"


def reference() -> str:
    """The whole reference as Markdown: a heading for each section, a row for each key."""
    schema = Job.model_json_schema()
    lines = [
        "# The job file",
        "",
        "Made by `distft check --reference` from the code. A key that is not listed here is an error; those that are",
        f"required have no default. `key{ENTRY}.more` is in each entry of a list, `key.{NAME}.more` under each name.",
    ]
    for title, described, rows in _sections(schema, schema, ""):
        lines += ["", f"## {title}", "", described, ""] if title else [""]
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _sections(schema: Schema, root: Schema, path: str) -> Iterator[tuple[str, str, list[str]]]:
    """Every section's dotted name, what it is, and its rows; those within it right after it."""
    prefix = f"{path}." if path else ""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    rows = [_row(prefix + name, its, root, required=name in required) for name, its in properties.items()]
    yield path, _words(schema.get("description", "")), rows
    for name, its in properties.items():
        for where, below in _below(its, root, prefix + name):
            yield from _sections(below, root, where)


def _below(schema: Schema, root: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """The sections that can stand at a key, in a list there, or under names there, each with its dotted name."""
    found = _resolved(schema, root)
    for option in (found, *found.get("anyOf", ())):
        each = _resolved(option, root)
        if "properties" in each:
            yield path, each
        for part, where in (("items", f"{path}{ENTRY}"), ("additionalProperties", f"{path}.{NAME}")):
            if isinstance(each.get(part), dict):
                yield from _below(each[part], root, where)
        if option is not found and "anyOf" in each:
            yield from _below(each, root, path)


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema itself where this is a reference to it."""
    name = schema.get("$ref")
    return root["$defs"][name.rpartition("/")[2]] if name else schema


def _row(key: str, schema: Schema, root: Schema, *, required: bool) -> str:
    default = "required" if required else f"`{json.dumps(schema.get('default'))}`"
    if not required and "default" not in schema:  # it is made anew for each job
        default = f"`{json.dumps(_made(key))}`"
    meaning = schema.get("description") or _resolved(schema, root).get("description", "")  # told once, where equal
    cells = (f"`{key}`", _takes(schema, root), _cell_default(default), _words(meaning))
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _made(key: str) -> Any:
    """A default that is made, such as that of a section."""
    info = Job.model_fields[key.partition(".")[0]]
    value = info.get_default(call_default_factory=True)
    for part in key.split(".")[1:]:
        value = getattr(value, part)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _cell_default(default: str) -> str:
    """A section's default is told key by key, below."""
    return "see below" if default.startswith("`{") and len(default) > 40 else default


def _takes(schema: Schema, root: Schema) -> str:
    """What a key takes, in words."""
    found = _resolved(schema, root)
    if "anyOf" in found:
        return " or ".join(dict.fromkeys(_takes(option, root) for option in found["anyOf"]))
    if "enum" in found or "const" in found:
        return " or ".join(f"`{value}`" for value in found.get("enum", [found.get("const")]))
    if "properties" in found:
        return "mapping"
    if found.get("type") == "array":
        most = found.get("maxItems")
        kind = _plural(_takes(found.get("items", {}), root))
        return f"list of {f'{most} ' if most else ''}{f'({kind})' if ' or ' in kind else kind}"
    bounds = [words.format(_bound(found[name])) for name, words in BOUNDS.items() if name in found]
    return ", ".join([TYPES.get(str(found.get("type")), "anything"), *bounds])


def _bound(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _plural(kind: str) -> str:
    return {"text": "texts", "number": "numbers", "whole number": "whole numbers", "mapping": "mappings"}.get(
        kind, kind
    )


def _words(text: str) -> str:
    """A docstring on one line; what it sets in code as Markdown has it."""
    return " ".join(text.split()).replace("``", "`")

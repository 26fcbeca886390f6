"""What the columns of a row hold, as text: plain text, the name of a label, a conversation."""

from __future__ import annotations

import json
from typing import Any

from distft.data.example import Column
from distft.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles of OpenAI's and ShareGPT's conversations, and what a chat template calls them."""


def as_text(column: Column, value: Any) -> str | None:
    """A column's value as the text that its task reads.

    Args:
        column: The column.
        value: What the row holds there; None also where it has no such column.

    Returns:
        The text; where it is null or blank, "" for an optional column and None for any other.

    Raises:
        DataError: The value is not of the column's kind.
    """
    if value is not None:
        value = {"text": _text, "label": _label, "messages": _messages}[column.kind](column.name, value)
    if not value or value.isspace():
        return "" if column.optional else None
    if not value.isascii():
        _refuse_lone_surrogates(value)
    return str(value)


def as_key(name: str, key: str, value: Any) -> str:
    """A value by which rows are grouped or stratified, as text; 1 and "1" differ.

    Args:
        name: The column.
        key: The key of the job file that names it.
        value: What the row holds there.

    Raises:
        DataError: It is null, or no plain value.
    """
    if not isinstance(value, str | int | float | bool):
        raise DataError(
            f"column {name!r} holds {_shown(value)}, which cannot be told from others",
            fix=f"{key} needs text, a number or a boolean in every row",
        )
    return json.dumps(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"column {name!r} holds {_shown(value)} of type {type(value).__name__}, not text",
            fix="name a text column in the task section, or turn the values into text",
        )
    return value


def _label(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise DataError(
            f"column {name!r} holds {_shown(value)} of type {type(value).__name__}, which is no label",
            fix="a label is text, a whole number or a boolean; write 3 for 3.0, or the name of the class",
        )
    return str(value)


def _messages(name: str, value: Any) -> str:
    """A conversation as the JSON text of a list of {"role", "content"}."""
    shape = 'it takes [{"role": "user", "content": "..."}, ...] or [{"from": "human", "value": "..."}, ...]'
    if isinstance(value, str):
        if not value.strip():
            return ""
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"column {name!r} holds text that is not JSON: {error}", fix=shape) from error
    if not isinstance(value, list):
        raise DataError(f"column {name!r} holds {_shown(value)}, not a list of messages", fix=shape)
    if not value:
        raise DataError(f"column {name!r} holds a conversation without messages", fix="remove the row, or make it null")
    messages = []
    for number, message in enumerate(value, start=1):
        try:
            messages.append(_message(message))
        except DataError as error:
            raise DataError(f"column {name!r}, message {number}: {error.what}", fix=error.fix or shape) from error
    return json.dumps(messages, ensure_ascii=False)


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"it is {_shown(message)}, not an object")
    role, content = ("role", "content") if message.get("role") is not None else ("from", "value")
    if message.get(role) is None:
        raise DataError(f"it has no role; its keys are {', '.join(message) or 'none'}")
    if not isinstance(message[role], str) or message[role] not in ROLES:
        raise DataError(f"unknown role {_shown(message[role])}", fix=f"known are {', '.join(ROLES)}")
    if content not in message:
        raise DataError(f"it has no {content}; its keys are {', '.join(message)}")
    text = "" if message[content] is None else message[content]
    if not isinstance(text, str):
        raise DataError(f"its {content} is {_shown(text)} of type {type(text).__name__}, not text")
    if calls := message.get("tool_calls"):  # kept as text, like a tool's answer
        text = "\n".join(filter(None, (text, json.dumps(calls, ensure_ascii=False))))
    return {"role": ROLES[message[role]], "content": text}


def _refuse_lone_surrogates(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"half a character (\\u{ord(value[error.start]):04x}) at character {error.start} of the text",
            fix="the text was cut within a surrogate pair; write it whole",
        ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

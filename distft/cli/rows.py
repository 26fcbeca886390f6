"""Rows as training sees them, for a person: which tokens are targets, which are special, where segments end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distft.data.store import Row

LINES = 40
"""The most lines that one row takes."""

CONTEXT, TARGET, SPECIAL = "", "green underline", "reverse"
_NEWLINE = "⏎"


def show(prepared: Path, model: Path, count: int, console: Console) -> None:
    """Prints rows of the training split, spread over it.

    Args:
        prepared: The prepared rows' folder.
        model: The model's folder, whose tokenizer made them.
        count: How many, at most.
        console: Where to.
    """
    from distft.data.store import Prepared
    from distft.model import load_tokenizer

    data, tokenizer = Prepared.open(prepared), load_tokenizer(model)
    rows = data.rows("train")
    plain = console.no_color or not console.is_terminal
    console.print(legend(plain))
    for index in spread(len(rows), count):
        row = rows[index]
        found = [data.document(number) for number in row.documents]
        places = [f"{document.source} row {document.row:,}" for document in found]
        title = f"row {index + 1:,} of {len(rows):,}: {len(row.input_ids):,} tokens, {row.supervised.sum():,} targets"
        console.print(Text(f"\n{title}", style="" if plain else "bold"))
        text = row_text(row, tokenizer, data.labels, places, plain=plain)
        for line in shortened(list(text.wrap(console, console.width))):
            console.print(line, soft_wrap=True)


def legend(plain: bool) -> Text:
    """What the marks mean."""
    target = Text("«targets»") if plain else Text("targets", TARGET)
    special = Text("<|special tokens|>", CONTEXT if plain else SPECIAL)
    marks = Text("  ").join([target, special, Text(f"{_NEWLINE} newline"), Text("── segment of a row")])
    return Text("\n").append(marks)


def spread(rows: int, count: int) -> list[int]:
    """The numbers of so many rows, or of all there are, evenly from the first to the last."""
    if count >= rows:
        return list(range(rows))
    return [round(number * (rows - 1) / max(count - 1, 1)) for number in range(count)]


def row_text(
    row: Row, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], places: Sequence[str], *, plain: bool
) -> Text:
    """A row, segment by segment.

    Args:
        row: The row.
        tokenizer: Its tokenizer.
        labels: The names of the labels, where a segment ends in one; none where it ends in a token.
        places: Where each segment comes from.
        plain: Whether targets are marked with «», rather than by style.
    """
    text, start = Text(), 0
    for length, place in zip(row.segments, places, strict=True):
        ids = row.input_ids[start : start + length].tolist()
        supervised = row.supervised[start : start + length].tolist()
        start += length
        text.append(f"── {place}\n", "" if plain else "dim")
        name = labels[ids.pop()] if labels else None
        if name is not None:
            supervised.pop()
        for shown, target, special in _runs(ids, supervised, tokenizer, tell_special=not plain):
            shown = shown.replace("\n", f"{_NEWLINE}\n")
            text.append(f"«{shown}»" if plain and target else shown, "" if plain else _style(target, special))
        if name is not None:
            text.append(" → ").append(f"«{name}»" if plain else name, "" if plain else TARGET)
        text.append("\n")
    text.right_crop()
    return text


def shortened(lines: Sequence[Text]) -> list[Text]:
    """The lines, without the middle where they are many."""
    if len(lines) <= LINES:
        return list(lines)
    first, last = LINES // 2, LINES // 2 - 1
    left_out = Text(f"   … {len(lines) - first - last:,} lines …", "dim")
    return [*lines[:first], left_out, *lines[-last:]]


def _runs(
    ids: Sequence[int], supervised: Sequence[bool], tokenizer: PreTrainedTokenizerBase, *, tell_special: bool
) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether it is a target, whether it is special) of neighbours alike; letters may take several tokens."""
    added = set(tokenizer.get_added_vocab().values()) if tell_special else set()
    tokens = [(number, target, number in added) for number, target in zip(ids, supervised, strict=True)]
    for (target, special), run in groupby(tokens, key=lambda token: token[1:]):
        yield tokenizer.decode([number for number, _, _ in run], clean_up_tokenization_spaces=False), target, special


def _style(target: bool, special: bool) -> str:
    return " ".join(filter(None, (TARGET if target else CONTEXT, SPECIAL if special else CONTEXT)))

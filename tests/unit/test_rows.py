"""What ``distft prepare --show`` prints."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from distft.cli.rows import LINES, TARGET, legend, row_text, shortened, show, spread
from distft.data.store import Row
from tests.unit.tiny_models import SMOLLM2, tokenizer

TOKENIZER = tokenizer(**{**SMOLLM2, "template": None})


def row(*segments: str) -> Row:
    """A row of segments in which «...» are targets."""
    ids: list[int] = []
    supervised, lengths = [], []
    for segment in segments:
        before = len(ids)
        for place, part in enumerate(segment.replace("»", "«").split("«")):
            tokens = TOKENIZER(part)["input_ids"]
            ids += tokens
            supervised += [place % 2 == 1] * len(tokens)
        lengths.append(len(ids) - before)
    return Row(0, np.array(ids, np.int32), np.array(supervised), tuple(lengths), tuple(range(len(lengths))))


def styles(text: Text) -> dict[str, str]:
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_targets_are_marked_where_there_is_no_colour() -> None:
    text = row_text(
        row("<|im_start|>Hi\n«größe 🙂<|im_end|>»", "A«B»"),
        TOKENIZER,
        (),
        ["a.jsonl row 3", "b.jsonl row 1"],
        plain=True,
    )
    assert text.plain.splitlines() == [
        "── a.jsonl row 3",
        "<|im_start|>Hi⏎",
        "«größe 🙂<|im_end|>»",
        "── b.jsonl row 1",
        "A«B»",
    ]
    assert text.spans == []


def test_targets_and_special_tokens_have_styles() -> None:
    text = row_text(row("<|im_start|>Hi«Yes<|im_end|>»"), TOKENIZER, (), ["x"], plain=False)
    assert text.plain == "── x\n<|im_start|>HiYes<|im_end|>"
    assert styles(text) == {
        "── x\n": "dim",
        "<|im_start|>": "reverse",
        "Yes": TARGET,
        "<|im_end|>": f"{TARGET} reverse",
    }


def test_the_label_is_named() -> None:
    made = row("A text«\x00»", "B«\x00»")
    ids = made.input_ids.copy()
    ids[[6, 8]] = [1, 0]
    labelled = Row(0, ids, made.supervised, made.segments, made.documents)
    text = row_text(labelled, TOKENIZER, ("no", "yes"), ["x", "y"], plain=True)
    assert text.plain.splitlines() == ["── x", "A text → «yes»", "── y", "B → «no»"]
    assert styles(row_text(labelled, TOKENIZER, ("no", "yes"), ["x", "y"], plain=False))["yes"] == TARGET


@pytest.mark.parametrize(
    ("rows", "count", "wanted"),
    [(10, 3, [0, 4, 9]), (3, 9, [0, 1, 2]), (5, 1, [0]), (2, 2, [0, 1]), (0, 4, [])],
)
def test_rows_are_spread_over_the_split(rows: int, count: int, wanted: list[int]) -> None:
    assert spread(rows, count) == wanted


def test_long_rows_lose_their_middle() -> None:
    lines = [Text(str(number)) for number in range(100)]
    kept = [line.plain for line in shortened(lines)]
    assert kept == [*map(str, range(20)), "   … 61 lines …", *map(str, range(81, 100))]
    assert len(kept) == LINES
    assert shortened(lines[:LINES]) == lines[:LINES]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from distft.config import Job
    from distft.task.prepare import prepare

    folder = tmp_path_factory.mktemp("rows")
    made = tokenizer(**{**SMOLLM2, "template": None})
    made.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(40):
            file.write(json.dumps({"en": f"word {number}\n" + "more " * number, "de": f"Wort {number}"}) + "\n")
    job = Job.from_values(
        {
            "model": {"source": "model"},
            "task": {"kind": "generation", "prompt": "{en}|", "response": "{de}"},
            "data": {"source": "pairs.jsonl", "max_tokens": 256, "splits": {"validation": 0.1, "test": 0.1}},
        },
        folder,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE", str(folder / "cache"))
        return prepare(job, folder / "model"), folder / "model"


def printed(prepared: tuple[Path, Path], **terminal: Any) -> str:
    output = io.StringIO()
    show(*prepared, 2, Console(file=output, width=80, highlight=False, **terminal))
    return output.getvalue()


def test_rows_of_prepared_data(prepared: tuple[Path, Path]) -> None:
    text = printed(prepared)
    assert "\x1b" not in text
    assert text.startswith(f"\n{legend(plain=True).plain.strip()}\n")
    assert text.count("targets\n") == 2
    assert "«Wort " in text
    assert "<|endoftext|>»" in text
    assert "── pairs.jsonl row " in text


def test_colour_on_a_terminal_and_marks_under_no_color(prepared: tuple[Path, Path]) -> None:
    assert "\x1b[4;32mWort " in printed(prepared, force_terminal=True, color_system="standard")
    assert "«Wort " in printed(prepared, force_terminal=True, no_color=True)

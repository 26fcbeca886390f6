"""The job file's reference: every key of every section is in it, with the words under its field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from distft.cli import main
from distft.config import Job
from distft.config.keys import fields
from distft.config.reference import reference


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a type, wherever: in unions, lists, mappings and root models."""
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from sections(annotation.model_fields["root"].annotation)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from sections(part)


def documented(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a model and of those within it, by its own name."""
    for name, info in model.model_fields.items():
        yield name, info
        for section in sections(info.annotation):
            yield from documented(section)


def rows() -> dict[str, tuple[str, str, str]]:
    found = {}
    for line in reference().splitlines():
        if line.startswith("| `"):
            key, takes, default, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found[key.strip("`")] = takes, default, meaning
    return found


def test_every_key_is_in_the_reference_with_its_meaning() -> None:
    found = rows()
    assert set(fields(Job)) <= set(found)
    meanings = {(key.rpartition(".")[2], meaning) for key, (_, _, meaning) in found.items()}
    wanted = {(name, " ".join((info.description or "").split()).replace("``", "`")) for name, info in documented(Job)}
    assert len(wanted) > 100
    assert {(name, text.replace("|", "\\|")) for name, text in wanted} == meanings
    assert all(text for _, text in meanings)


@pytest.mark.parametrize(
    ("key", "takes", "default"),
    [
        ("train.learning_rate", "number, above 0, at most 1", "`2e-05`"),
        ("zero.stage", "whole number, at least 0, at most 3 or `auto`", '`"auto"`'),
        ("model.source", "text", "required"),
        ("task.kind", "`language_modeling` or `classification` or `generation`", "required"),
        ("data.packing", "true or false", "`true`"),
        ("train.steps", "whole number, at least 1 or null", "`null`"),
        ("cluster.resources_per_worker", "mapping", '`{"CPU": 1.0}`'),
        ("cluster.workers.max", "whole number, at least 1", "required"),
        ("data.source[].weight", "number, above 0", "`1.0`"),
        ("data.source.train[].weight", "number, above 0", "`1.0`"),
        ("search.space.NAME.log_uniform", "list of 2 numbers or null", "`null`"),
        ("data.source.train", "text or list of (text or mapping)", "required"),
        ("checkpoint.every.steps", "whole number, at least 1", "required"),
        ("train", "mapping", "see below"),
    ],
)
def test_what_a_key_takes_and_its_default(key: str, takes: str, default: str) -> None:
    assert rows()[key][:2] == (takes, default)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "--reference"])
    assert not left.value.code
    assert capsys.readouterr().out == reference()
    with pytest.raises(SystemExit) as left:
        main(["check"])
    assert left.value.code == 2

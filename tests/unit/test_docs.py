"""What the documents name is there: commands with their options, job files, scripts, make targets, files and links."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest
import typer

from distft.cli import app
from distft.config import Job
from tests.support import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md"]
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app)
#: Made by commands that the documents name, and by whoever follows the walk-through.
MADE = re.compile(r"launch/(data/)?\w+\.jsonl|launch/(data/make_)?keywords\.\w+")


def code(path: Path) -> Iterator[str]:
    """Each line of code of a document: of its blocks, and what stands in backticks; of other files their comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        yield from (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        yield from re.findall(r"`([^`\n]+)`", text)
        return
    for block in FENCED.findall(text):
        yield from (line.strip().removeprefix("$ ") for line in block.splitlines())
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text)))


def named(pattern: str, *more: Path) -> list[tuple[str, str]]:
    """The lines of code that match, each with its document."""
    found = [(path.name, line) for path in (*DOCUMENTS, *more) for line in code(path) if re.match(pattern, line)]
    assert found
    return sorted(set(found))


LAUNCH = sorted((ROOT / "launch").glob("*.*"))
DISTFT = named(r"(\.venv/bin/)?distft [a-z]+( |$)", *LAUNCH)


@pytest.mark.parametrize(("document", "line"), DISTFT)
def test_a_command_of_ours_is_one_with_these_options(document: str, line: str) -> None:
    """Of one that is not whole (brackets, no argument) the options are looked at; any other is parsed as if called."""
    line = re.sub(r"\s+#.*| >.*", "", line.replace("\\|", "|")).removeprefix(".venv/bin/")
    name = line.split()[1]
    command = COMMANDS.get_command(None, name)  # type: ignore[attr-defined]
    assert command is not None, f"{document}: distft {name}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"(?<!\S)--[\w-]+", line.replace("[", " ").replace("]", " "))) <= known | {"--debug"}
    words = [word for word in shlex.split(line)[2:] if word != "--debug"]
    if not words or words[0].startswith("-") or re.search(r"\[|\.\.\.", line):
        return
    values = dict.fromkeys("NMPS", "1")
    command.make_context(name, [values.get(word, word) for word in words])
    for job in (word for word in words if word.startswith("launch/") and not MADE.fullmatch(word)):
        Job.load(ROOT / job, [words[place + 1] for place, word in enumerate(words) if word == "--set"])


@pytest.mark.parametrize(("document", "line"), named(r"python (-m )?benchmarks"))
def test_a_benchmark_is_there_with_these_options(document: str, line: str) -> None:
    script = line.split()[2].replace(".", "/") + ".py" if " -m " in line else line.split()[1]
    text = (ROOT / script).read_text(encoding="utf-8")
    for option in re.findall(r"(?<!\S)--[\w-]+", line):
        assert f'"{option}"' in text, f"{document}: {line}"


@pytest.mark.parametrize(("document", "line"), named(r"make [a-z-]+( |$)"))
def test_a_target_of_make_is_there(document: str, line: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in targets, document


TOP = "benchmarks|cluster|distft|launch|tests"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_links_of_a_document_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    files = {word for line in code(document) for word in re.findall(rf"(?<![\w/.-])(?:{TOP})/[\w/.-]*\w", line)}
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = {str(document.parent / link) for link in links if "://" not in link}
    lost = [place for place in files | local if not (ROOT / place).exists() and not MADE.fullmatch(place)]
    assert lost == []
    titles = re.findall(r"^#+ (.*)", FENCED.sub("", text), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_the_walk_through_names_what_is_in_the_files_that_it_names() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding a task")[2].partition("\n## ")[0]
    items = re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:-1]
    assert len(items) == 8
    for item in items:
        spans = re.findall(r"`([^`]+)`", FENCED.sub("", item.replace("   ```", "```")))
        files = [ROOT / span for span in spans if "/" in span and not MADE.fullmatch(span)]
        names = {span.rpartition(".")[2] for span in spans if re.fullmatch(r"[A-Za-z_.]+", span) and span != "item_f1"}
        held = "".join(path.read_text(encoding="utf-8") for path in files)
        assert not [name for name in names if name not in held], item


def test_docstrings_are_read_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As those who render them read them: what they say of parameters, attributes and errors is of the code's own."""

    def parse(item: griffe.Object) -> int:
        if item.docstring:
            item.docstring.parse("google")
        own = [member for member in item.members.values() if isinstance(member, griffe.Object)]
        return bool(item.docstring) + sum(map(parse, own))

    with caplog.at_level(logging.WARNING):
        package = griffe.load("distft", search_paths=[ROOT], allow_inspection=False)
        assert isinstance(package, griffe.Module)
        assert parse(package) > 1000
    assert not caplog.messages

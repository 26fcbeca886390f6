"""The job file as it was written: plain values, and for each of them the line that it stands on.

YAML 1.2, so that ``2e-5`` is a number and ``no`` is a word. The tree of nodes is turned into values here rather than by
ruamel's constructor, which stops at the first duplicate key and forgets how a number was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from distft.config.problems import Finding, InvalidJob, Path, Problem, dotted

LARGEST_FILE_BYTES = 1 << 20
"""Anything larger is not a job file but, say, the model given in its place."""

SYNTAX = {
    "found character '\\t'": ("a tab is used for indentation", "YAML wants spaces"),
    "mapping values are not allowed here": (
        "a second `:` stands where a value is expected",
        "check the indentation of this line and the one before, or put the value in quotes",
    ),
    "expected <block end>": ("the indentation fits no line above", "align the keys of a section exactly"),
    "could not find expected ':'": ("this line is no `key: value`", "is a `:` or the space after it missing?"),
    "expected a single document": ("the file holds several documents", "keep one, and remove the line ---"),
    "but found another document": ("the file holds several documents", "keep one, and remove the line ---"),
    "expected ',' or": ("a bracket is not closed", "close it with ] or }"),
    "found '<stream end>'": ("a bracket is not closed", "close it with ] or }"),
    "unexpected end of stream": ("a quotation mark is not closed", "close it"),
    "found undefined alias": ("`*` refers to a value that is named nowhere", "put text that begins with * in quotes"),
    "cannot start any token": ("this character cannot begin a value", "put the value in quotes"),
    "sequence entries are not allowed": ("a list cannot begin here", "put each `- entry` on a line of its own"),
}
"""What YAML's own complaints mean: part of the complaint -> (what is wrong, what to do)."""


@dataclass(frozen=True)
class Mark:
    """Where a value was written, and how: ``job.yaml:12``, line 12, ``1e2``."""

    where: str
    line: int | None = None
    written: str | None = None


@dataclass(frozen=True)
class Document:
    """Values with their places.

    Attributes:
        name: The file, as it was given.
        values: The plain values: mappings, lists, text, numbers, true and false, None.
        marks: Where each value was written, by its path.
        problems: What is wrong with the writing itself, such as a key that stands twice.
        text: The file, word for word; empty for values that come from no file.
    """

    name: str
    values: Mapping[str, Any]
    marks: Mapping[Path, Mark] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    text: str = ""

    def mark(self, path: Path) -> Mark:
        """The place of a value; for one that is absent, that of the section that ought to hold it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]]
        return Mark(self.name)

    def value(self, path: Path) -> Any:
        """The value at ``path``; None where there is none."""
        current: Any = self.values
        try:
            for part in path:
                current = below(current, part)
        except LookupError:
            return None
        return current

    def show(self, path: Path) -> str:
        """A value as a person would recognise it: as it was written where that is known."""
        mark = self.marks.get(path)
        return mark.written if mark and mark.written is not None else show(self.value(path))

    def place(self, finding: Finding) -> Problem:
        """The finding with the line, or the ``--set``, that it concerns."""
        mark = self.mark(finding.path)
        value = self.value(finding.path)
        return Problem(mark.where, mark.line, dotted(finding.path), value, finding.message, finding.fix)


def below(value: Any, part: str | int) -> Any:
    """The entry of a mapping or list; LookupError where there is none."""
    if isinstance(value, Mapping):
        return value[part]
    if isinstance(value, list) and isinstance(part, int):
        return value[part]
    raise LookupError(part)


def show(value: Any) -> str:
    """A plain value as YAML would have it, shortened to one readable line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."


def read(path: File) -> Document:
    """Reads a job file.

    Raises:
        InvalidJob: The file is missing, unreadable or not YAML with a mapping at its top; with the line.
    """
    name = str(path)
    text = _text(path, name)
    node = compose(text, name)
    if node is None:
        raise _broken(
            name, None, "the file is empty", "a job file names at least model.source, task.kind and data.source"
        )
    if not isinstance(node, MappingNode):
        raise _broken(
            name, node.start_mark.line + 1, "the file does not consist of `key: value` lines", "begin with model:"
        )
    reader = _Reader(name)
    return Document(name, reader.mapping(node, ()), reader.marks, tuple(reader.problems), text)


def compose(text: str, name: str) -> Node | None:
    """The tree of YAML nodes of ``text``; None where it holds nothing.

    Raises:
        InvalidJob: It is not YAML.
    """
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        complaint = f"{error.context or ''} {error.problem or ''}".strip()
        what, fix = next((SYNTAX[part] for part in SYNTAX if part in complaint), (f"not YAML: {complaint}", None))
        opened = what.endswith("not closed") and error.context_mark  # where it was opened says more than where it ends
        mark = opened or error.problem_mark or error.context_mark
        raise _broken(name, mark.line + 1 if mark else None, what, fix) from None
    except YAMLError as error:
        raise _broken(name, None, f"not YAML: {str(error).splitlines()[0]}", "is this a job file?") from None
    except RecursionError:
        raise _broken(name, None, "brackets are nested too deeply", "is this a job file?") from None
    return node


def plain(node: Node, name: str, path: Path) -> tuple[Any, dict[Path, Mark], list[Problem]]:
    """The plain value of a node, the place of each value in it, and what is wrong with the writing."""
    reader = _Reader(name)
    value = reader.value(node, path)
    return value, reader.marks, reader.problems


def _text(path: File, name: str) -> str:
    """The text of the file; InvalidJob where it cannot be had."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= LARGEST_FILE_BYTES else b""
    except FileNotFoundError:
        folder = path.parent
        known = sorted(file.name for file in folder.glob("*.y*ml")) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, known, n=1) or known[:8]
        fix = f"in that folder: {', '.join(near)}" if near else "check the path"
        raise _broken(name, None, "there is no such file", fix) from None
    except OSError as error:
        raise _broken(name, None, f"the file cannot be read: {error.strerror}", "a job file is a text file") from None
    if size > LARGEST_FILE_BYTES:
        raise _broken(name, None, f"the file has {size:,} bytes, which no job file has", "is this a job file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"the file is not UTF-8: byte 0x{data[error.start]:02x}"
        raise _broken(name, line, what, "save it in UTF-8") from None


def _broken(name: str, line: int | None, what: str, fix: str | None) -> InvalidJob:
    """The error for a file that cannot be read any further."""
    where = name if line is None else f"{name}:{line}"
    return InvalidJob([Problem(where, line, "", None, what, fix)])


class _Reader:
    """Turns nodes into plain values and remembers where each was written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.marks: dict[Path, Mark] = {}
        self.problems: list[Problem] = []
        self.open: set[int] = set()

    def value(self, node: Node, path: Path) -> Any:
        """The plain value of any node."""
        self.marks.setdefault(path, self.mark(node))
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            self.complain(node, path, "the value contains itself", "remove the `*` that refers to it")
            return None
        self.open.add(id(node))
        if isinstance(node, MappingNode):
            value: Any = self.mapping(node, path)
        else:
            assert isinstance(node, SequenceNode)
            value = [self.value(entry, (*path, index)) for index, entry in enumerate(node.value)]
        self.open.discard(id(node))
        return value

    def mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        """The keys and values of a mapping; a key's place is that of the key, so that a section has one."""
        values: dict[str, Any] = {}
        for key, entry in node.value:
            if not isinstance(key, ScalarNode):
                self.complain(key, path, "a key must be a word", "is a bracket open, or quotes missing?")
                continue
            inner = (*path, key.value)
            if key.value in values:
                first = self.marks[inner].line
                message = f"written twice, first on line {first}"
                self.complain(key, inner, message, "keep one of them", self.written(entry))
                continue
            mark = self.mark(key)
            self.marks[inner] = Mark(mark.where, mark.line, self.written(entry))
            values[key.value] = self.value(entry, inner)
        return values

    def scalar(self, node: ScalarNode, path: Path) -> Any:
        """A scalar by its YAML 1.2 type; a date stays the text that it is."""
        kind = str(node.tag).rpartition(":")[2]
        if kind not in {"str", "null", "bool", "int", "float", "timestamp"}:
            self.complain(node, path, f"the tag {node.tag} means nothing in a job file", "remove it")
            return None
        return scalar(node.value, kind)

    def mark(self, node: Node) -> Mark:
        """Where a node begins."""
        line = node.start_mark.line + 1
        return Mark(f"{self.name}:{line}", line, self.written(node))

    def written(self, node: Node) -> str | None:
        """How a scalar is written, text in quotation marks; None for anything longer."""
        if not isinstance(node, ScalarNode) or len(node.value) > 70:
            return None
        is_text = str(node.tag).endswith(":str")
        return repr(node.value) if is_text else node.value or "null"

    def complain(self, node: Node, path: Path, message: str, fix: str, value: str | None = None) -> None:
        """Notes a problem with the writing; no value: there is none to be had."""
        mark = self.mark(node)
        self.problems.append(Problem(mark.where, mark.line, dotted(path), value, message, fix))


def scalar(text: str, kind: str) -> Any:
    """The value of a scalar's text, ``kind`` being its YAML type: null, bool, int, float, or any other for text."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    number = text.replace("_", "")
    try:
        if kind == "int":
            return int(number, 0 if number.lstrip("+-")[:2].lower() in {"0x", "0o", "0b"} else 10)
        if kind == "float":
            return float(number.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text
    return text

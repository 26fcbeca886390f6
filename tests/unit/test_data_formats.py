"""The same rows in every format are the same records; what is broken is named with its file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data import documents, text_files
from distft.data.documents import Columns, Record, Source, length, plan_units, read
from distft.data.example import Column
from distft.errors import DataError

TASK = Columns((Column("text"), Column("label", "label"), Column("note", optional=True)), group="by")
ROWS: list[dict[str, Any]] = [
    {"text": "one", "label": "a", "note": "n", "by": "x"},
    {"text": 'two, "quoted"\nover\r\n\nlines\t!', "label": "b", "note": "", "by": "x"},
    {"text": "", "label": "a", "note": "n", "by": "y"},  # null in the formats that know it
    {"text": "word " * 40_000, "label": "b", "note": "", "by": "y"},
    {"text": "ü𝄞\u2028", "label": "a", "note": '"', "by": "z"},
] * 3
NULLED = [{name: value or None for name, value in row.items()} for row in ROWS]
TEXT = Columns((Column("text"),))


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(delimiter: str = ",", end: str = "\r\n") -> bytes:
    made = io.StringIO()
    writer = csv.DictWriter(made, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return b"\xef\xbb\xbf" + made.getvalue().encode()


def arrow(path: Path, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(NULLED)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def compressed(path: Path, content: bytes) -> None:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(NULLED)),
    "a.json": lambda path: path.write_text(json.dumps(NULLED, indent=1)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": [1], "data": NULLED})),
    "lines.json": lambda path: path.write_bytes(jsonl(NULLED)),
    "a.csv": lambda path: path.write_bytes(delimited()),
    "unix.csv": lambda path: path.write_bytes(delimited(end="\n")),
    "a.tsv": lambda path: path.write_bytes(delimited("\t")),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(NULLED), path, row_group_size=4),
    "file.arrow": lambda path: arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: arrow(path, pa.ipc.new_stream),  # as datasets.save_to_disk writes it
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(NULLED))),
    "members.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(jsonl(NULLED[:7])) + gzip.compress(jsonl(NULLED[7:]))
    ),
    "a.csv.bz2": lambda path: path.write_bytes(bz2.compress(delimited())),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(NULLED).encode())),
    "a.tsv.zst": lambda path: compressed(path, delimited("\t")),
    "a.ndjson.zst": lambda path: compressed(path, jsonl(NULLED)),
}


def plan(path: Path, *, lines: bool = False, limit: int | None = None) -> list[documents.Piece]:
    return [piece for unit in plan_units([Source(path, path.name)], lines, limit) for piece in unit]


def records(path: Path, columns: Columns = TEXT, **options: Any) -> list[Record]:
    return [record for piece in plan(path, **options) for record in read(piece, columns)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit_bytes", [100, 1 << 20])
def test_the_same_rows_are_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit_bytes: int
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", unit_bytes)
    path = tmp_path / name
    WRITERS[name](path)
    found = [replace(record, row=0) for record in records(path, TASK)]
    assert found == [
        Record(0, (row["text"] or None, row["label"], row["note"]), group=json.dumps(row["by"])) for row in ROWS
    ]
    assert [record.is_empty for record in found] == [row["text"] == "" for row in ROWS]
    assert [replace(record, row=0) for record in records(path, TASK, limit=4)] == found[:4]
    if unit_bytes == 100 and name in {"a.jsonl", "a.csv", "unix.csv", "a.tsv", "file.arrow", "stream.arrow"}:
        assert len(plan(path)) > 3


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_txt_file(tmp_path: Path, ending: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path = tmp_path / f"a.txt{ending}"
    if ending == ".zst":
        compressed(path, b"one\r\ntwo\n")
    else:
        path.write_bytes(pack[ending](b"one\r\ntwo\n"))
    assert [record.text for record in records(path)] == [("one\ntwo\n",)]
    assert [record.text for record in records(path, lines=True)] == [("one",), ("two",)]
    assert [record.text for record in records(path, lines=True, limit=1)] == [("one",)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.text('ab",\n\r\t ü', max_size=6), min_size=2, max_size=2), min_size=1, max_size=12),
    unit_bytes=st.integers(1, 40),
    format_=st.sampled_from(["csv", "tsv"]),
)
def test_no_record_is_lost_or_read_twice_wherever_a_csv_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], unit_bytes: int, format_: str
) -> None:
    made = io.StringIO()
    csv.writer(made, quoting=csv.QUOTE_ALL, delimiter="," if format_ == "csv" else "\t").writerows([["x", "y"], *rows])
    path = tmp_path_factory.mktemp("cut") / f"a.{format_}"
    path.write_bytes(made.getvalue().encode())
    lines = made.getvalue().encode().split(b"\n")
    found, before = [], 0
    for piece in text_files.cut(0, path, path.name, format_, unit_bytes):
        for number, values in text_files.rows(piece, ()):
            found.append([values["x"], values["y"]])
            assert lines[before + number - 1].startswith(b'"')
            assert text_files.where(piece, number) == f"{path.name}, line {before + number}"
        before += length(piece)
    assert found == rows


def refused(path: Path, content: bytes | str, columns: Columns = TEXT) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        records(path, columns)
    assert error.value.fix
    assert path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ('text,n\nfine,1\na "stray" quote,2\nfine,3\n', 3, "a stray quote"),
        ('text,n\n"fine\nover two",1\n"closed"early,2\n', 4, "is broken"),
        ('text,n\nfine,1\n"never closed,2\nfine,3\nfine,4\n', 3, "is broken"),
        ('text,n\nfine,1\n\nfine, "2"\n', 4, "a stray quote"),
        ("text,n\nfine,1\ntoo,many,2\n", 3, "3 fields, where the header has 2: text, n"),
        ("text,n\nfine,1\nfew\n", 3, "1 fields, where the header has 2: text, n"),
        ("text,n\rold,1\rmac,2\r", 1, "is broken"),
    ],
)
def test_csv_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, line: int, what: str
) -> None:
    for unit_bytes in (10, 1000):
        monkeypatch.setattr(documents, "UNIT_BYTES", unit_bytes)
        message = refused(tmp_path / "a.csv", content)
        assert f"a.csv, line {line}: " in message
        assert what in message
        packed = refused(tmp_path / "a.csv.gz", gzip.compress(content.encode()))
        assert f"a.csv.gz, line {line}: " in packed
        assert what in refused(tmp_path / "a.tsv", content.replace(",", "\t"))


def test_headers_that_are_none(tmp_path: Path) -> None:
    assert "names 'text' twice" in refused(tmp_path / "a.csv", "text,text\n1,2\n")
    assert "no header" in refused(tmp_path / "a.csv", "\n\n")
    assert "columns here: body, n" in refused(tmp_path / "a.csv", "body,n\nx,1\n")
    assert "byte 0xe9 at offset 7" in refused(tmp_path / "a.csv", b"text\nab\xe9\n")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"text": "x"}', "the object holds no array of objects"),
        ('{"a": [{"text": "x"}], "b": [{"text": "x"}]}', "2 arrays of objects: a, b"),
        ('"text"', "the file holds a str, not an array"),
        ('[{"text": "x"}, 5]', "row 2: the row is a int"),
        ('[{"text": "x"}, {"text": 5}]', "row 2: column 'text' holds 5 of type int"),
        ('[{"text": "x"}, {"n": 5}]', "row 2: there is no column 'text'"),
        ('[{"text": "x"},', "broken JSON"),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_json_that_is_broken(tmp_path: Path, content: str, what: str) -> None:
    assert what in refused(tmp_path / "a.json", content)


def test_a_json_file_too_large_to_be_parsed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_JSON_BYTES", 100)
    assert "turn it into jsonl" in refused(tmp_path / "a.json", json.dumps([{"text": "x" * 100}]))


def test_archives_cut_short_and_damaged(tmp_path: Path) -> None:
    content = jsonl([{"text": str(number) * 50} for number in range(2000)])
    compressed(tmp_path / "whole.zst", content)
    packed = {
        ".gz": gzip.compress(content),
        ".bz2": bz2.compress(content),
        ".xz": lzma.compress(content),
        ".zst": (tmp_path / "whole.zst").read_bytes(),
    }
    for ending, whole in packed.items():
        path = tmp_path / f"a.jsonl{ending}"
        assert f"the {ending} file is cut short or damaged" in refused(path, whole[: len(whole) // 2])
        assert f"the {ending} file is cut short or damaged" in refused(path, b"no archive at all, but text")
        path.write_bytes(whole)
        assert len(records(path)) == 2000


def test_arrow_files_cut_short(tmp_path: Path) -> None:
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        arrow(tmp_path / name, new)
        whole = (tmp_path / name).read_bytes()
        assert "not a whole arrow file" in refused(tmp_path / name, whole[: len(whole) // 2])
        assert "not a whole arrow file" in refused(tmp_path / name, b"ARROW1 or so it seems, but no more")
    arrow(tmp_path / "whole.arrow", pa.ipc.new_stream)
    assert "row 6: column 'label'" in str(
        refused(tmp_path / "bad.arrow", numbers(pa.ipc.new_stream), Columns((Column("label", "label"),)))
    )


def numbers(new: Callable[..., Any]) -> bytes:
    """Whole numbers as labels, and then one that is no label, in the second batch."""
    schema = pa.schema({"label": pa.float64()})
    made = io.BytesIO()
    with new(made, schema) as writer:
        for values in ([None] * 5, [1.0, 2.0]):
            writer.write_batch(pa.record_batch([values], schema=schema))
    return made.getvalue()


def test_labels_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"label": value} for value in (3, True, "x", None, " ")]))
    assert [record.text for record in records(path, Columns((Column("label", "label"),)))] == [
        ("3",),
        ("true",),
        ("x",),
        (None,),
        (None,),
    ]
    message = refused(path, jsonl([{"label": 3}, {"label": 3.5}]), Columns((Column("label", "label"),)))
    assert "a.jsonl, line 2: column 'label' holds 3.5 of type float, which is no label" in message


CHAT = Columns((Column("chat", "messages"),))
OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None},
    {"role": "tool", "content": "42"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": ""},
    {"from": "observation", "value": "42", "weight": 1},
]


def test_conversations_of_either_shape_are_the_same(tmp_path: Path) -> None:
    path, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    path.write_bytes(jsonl([{"chat": chat} for chat in (OPENAI, SHAREGPT, json.dumps(OPENAI), None, "")]))
    texts = [record.text[0] for record in records(path, CHAT)]
    same = [{**message, "content": message["content"] or ""} for message in OPENAI]
    assert [text and json.loads(text) for text in texts] == [same, same, same, None, None]
    pq.write_table(pa.table({"chat": [OPENAI]}), table)
    assert [record.text[0] for record in records(table, CHAT)] == texts[:1]
    calls = [{"id": "1", "function": {"name": "add", "arguments": "{}"}}]
    path.write_bytes(jsonl([{"chat": [{"role": "assistant", "content": None, "tool_calls": calls}]}]))
    (record,) = records(path, CHAT)
    assert json.loads(json.loads(record.text[0] or "")[0]["content"]) == calls


@pytest.mark.parametrize(
    ("chat", "what"),
    [
        ([], "a conversation without messages"),
        ({"role": "user"}, "not a list of messages"),
        ("Hi", "text that is not JSON"),
        (["Hi"], "message 1: it is 'Hi', not an object"),
        ([OPENAI[0], {"role": "robot", "content": "x"}], "message 2: unknown role 'robot'"),
        ([{"role": "user"}], "message 1: it has no content; its keys are role"),
        ([{"from": "human"}], "message 1: it has no value; its keys are from"),
        ([{"content": "x"}], "message 1: it has no role; its keys are content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "of type list, not text"),
        ([{"role": ["user"], "content": "x"}], "unknown role ['user']"),
        ([{"role": "user", "content": "\ud83d"}], "half a character"),
    ],
)
def test_conversations_that_are_none(tmp_path: Path, chat: object, what: str) -> None:
    row = json.dumps({"chat": chat}) + "\n"
    message = refused(tmp_path / "a.jsonl", json.dumps({"chat": OPENAI}) + "\n" + row, CHAT)
    assert "a.jsonl, line 2: " in message
    assert what in message


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    path, columns = tmp_path / "a.jsonl", Columns((Column("text"), Column("context", optional=True)))
    path.write_bytes(jsonl([{"text": "x"}, {"text": "y", "context": None}, {"text": "z", "context": "c"}]))
    assert [record.text for record in records(path, columns)] == [("x", ""), ("y", ""), ("z", "c")]
    assert not any(record.is_empty for record in records(path, columns))
    table = tmp_path / "a.csv"
    table.write_text("text\nx\n")
    assert [record.text for record in records(table, columns)] == [("x", "")]
    assert "no column 'other'" in refused(table, "text\nx\n", replace(columns, group="other"))


FEATURES = {
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
    "by": {"names": ["press", "people"], "_type": "ClassLabel"},
    "spans": {"feature": {"names": ["B", "I"], "_type": "ClassLabel"}, "_type": "Sequence"},
}


def with_features(features: object, labels: list[int | None]) -> pa.Table:
    """A table as ``datasets.Dataset.to_parquet`` and ``save_to_disk`` write it."""
    count = len(labels)
    table = pa.table({"text": ["a text"] * count, "label": labels, "by": [1] * count, "spans": [[0, 1]] * count})
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(("name", "write"), [("a.parquet", pq.write_table), ("a.arrow", write_stream)])
def test_classes_of_a_data_set_have_their_names(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    path, columns = tmp_path / name, Columns((Column("text"), Column("label", "label")), group="by")
    write(with_features(FEATURES, [1, 0, None, -1, 1]), path)
    ((piece,),) = plan_units([Source(path, name)], lines=False)
    records = list(read(piece, columns))
    assert [record.text[1] for record in records] == ["pos", "neg", None, None, "pos"]
    assert [record.is_empty for record in records] == [False, False, True, True, False]
    assert {record.group for record in records} == {'"people"'}
    write(with_features(FEATURES, [0, 2]), path)
    ((piece,),) = plan_units([Source(path, name)], lines=False)
    with pytest.raises(DataError, match="'label' holds 2, and the file names 2 classes: neg, pos") as caught:
        list(read(piece, columns))
    assert caught.value.where == f"{name}, row 2"


@pytest.mark.parametrize("features", [{}, [], None, {"label": {"_type": "ClassLabel"}}, {"label": {"dtype": "int64"}}])
def test_numbers_that_no_features_name_stay_numbers(features: object, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(with_features(features, [1, 0]), path)
    ((piece,),) = plan_units([Source(path, "a")], lines=False)
    assert [record.text for record in read(piece, Columns((Column("label", "label"),)))] == [("1",), ("0",)]

"""Reading documents: the same rows however a file is cut, and a clear word about every bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data import documents
from distft.data.documents import Columns, Piece, Record, Source, length, plan_units, read
from distft.data.example import Column
from distft.errors import DataError

TEXT = Columns((Column("text"),))


def sources(*paths: Path) -> list[Source]:
    return [Source(path, path.name) for path in paths]


def records(path: Path, columns: Columns = TEXT, *, lines: bool = False, limit: int | None = None) -> list[Record]:
    units = plan_units(sources(path), lines, limit)
    return [record for unit in units for piece in unit for record in read(piece, columns)]


def texts(path: Path, **options: bool | int) -> list[str | None]:
    return [record.text[0] for record in records(path, **options)]  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, rows: list[object]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_a_txt_file_is_one_document_or_one_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo \n\nfour")
    assert texts(path) == ["one\ntwo \n\nfour"]
    assert texts(path, lines=True) == ["one", "two ", None, "four"]
    assert [record.row for record in records(path, lines=True)] == [1, 2, 3, 4]
    assert [record.is_empty for record in records(path, lines=True)] == [False, False, True, False]
    assert texts(path, lines=True, limit=2) == ["one", "two "]


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", '\ufeff{"text": "é", "g": 1}\r\n\n{"text": null, "g": "1"}\n{"g": true, "text": ""}'
    )
    found = records(path, Columns((Column("text"),), "g", "g"))
    assert [record.text for record in found] == [("é",), (None,), (None,)]
    assert [record.group for record in found] == ["1", '"1"', "true"]
    assert [record.row for record in found] == [1, 3, 4]
    assert texts(path, limit=2) == ["é", None]


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=30)),
    cut=st.integers(1, 60),
)
def test_no_line_is_lost_or_read_twice_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cut: int
) -> None:
    content = "".join(f"{line}\n" for line in ["first", *lines]).encode()
    path = write(tmp_path_factory.mktemp("cut") / "a.txt", content)
    pieces = [
        Piece(0, path, "a.txt", "lines", start, min(start + cut, len(content)), cut)
        for start in range(0, len(content), cut)
    ]
    found, before = [], 0
    for piece in pieces:
        found += [(before + record.row, record.text[0]) for record in read(piece, TEXT)]
        before += length(piece)
    assert found == [(number, line if line.strip() else None) for number, line in enumerate(["first", *lines], 1)]


def test_parquet_by_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one", None, "three", "four", "five"], "n": [1, 2, 3, 4, 5]})
    pq.write_table(table, path, row_group_size=2)
    pieces = [piece for unit in plan_units(sources(path), False) for piece in unit]
    assert [piece.start for piece in pieces] == [0, 1, 2]
    assert texts(path) == ["one", None, "three", "four", "five"]
    assert texts(path, limit=3) == ["one", None, "three"]
    assert [length(piece) for piece in pieces] == [2, 2, 1]


def test_units_hold_small_files_together_and_cut_big_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 1000)
    paths = [write(tmp_path / f"{number}.txt", "x" * 300) for number in range(7)]
    assert [len(unit) for unit in plan_units(sources(*paths), False)] == [3, 3, 1]
    big = jsonl(tmp_path / "big.jsonl", [{"text": "x" * 90}] * 45)
    units = plan_units(sources(big), False)
    assert len(units) == 5
    assert len(texts(big)) == 45
    assert plan_units(sources(*paths, big), False, 5) == plan_units(sources(*paths[:5]), False)


def test_limit_is_for_each_given_split(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.txt", "x\n" * 9) for number in range(4)]
    given_splits = [Source(path, path.name, "train" if place < 2 else "test") for place, path in enumerate(paths)]
    pieces = [piece for unit in plan_units(given_splits, True, 10) for piece in unit]
    assert [sum(1 for _ in read(piece, TEXT)) for piece in pieces] == [9, 1, 9, 1]


def refused(path: Path, columns: Columns = TEXT, *, lines: bool = False) -> str:
    with pytest.raises(DataError) as error:
        records(path, columns, lines=lines)
    assert path.name in str(error.value)
    return str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "missing.txt")
    assert "is empty" in refused(write(tmp_path / "empty.jsonl", ""))
    assert "files of type .docx cannot be read" in refused(write(tmp_path / "a.docx", "x"))
    assert "files of type .parquet.gz cannot be read" in refused(write(tmp_path / "a.parquet.gz", "x"))


def test_not_utf8_says_byte_and_line(tmp_path: Path) -> None:
    raw = b"first\nsecond\nth\xe9rd\n"
    message = refused(write(tmp_path / "a.txt", raw))
    assert "byte 0xe9 at offset 15" in message
    assert "a.txt, line 3" in message
    assert "byte 0xe9 at offset 18" in refused(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + raw), lines=True)
    assert "line 2" in refused(write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n'))


def test_broken_json_says_the_line_of_the_file_even_in_a_later_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 64)
    path = write(tmp_path / "a.jsonl", '{"text": "a line of some length"}\n' * 20 + '{"text": \n' + '{"text": "z"}\n')
    assert "a.jsonl, line 21" in refused(path)
    assert "holds a list" in refused(write(tmp_path / "b.jsonl", "[1]\n"))


def test_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    message = refused(jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "x", "id": 1}]))
    assert "no column 'text'" in message
    assert "line 2" in message
    assert "body, id" in message
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    assert "columns here: body, n" in refused(tmp_path / "a.parquet")
    assert "columns here: text, source" in refused(write(tmp_path / "a.txt", "x"), Columns((Column("text"),), "author"))


def test_what_is_not_text_says_row_and_type(tmp_path: Path) -> None:
    message = refused(jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": 5}]))
    assert "line 2" in message
    assert "holds 5 of type int, not text" in message
    pq.write_table(pa.table({"text": [1, 2, 3]}), tmp_path / "a.parquet", row_group_size=2)
    assert "row 1" in refused(tmp_path / "a.parquet")
    assert "half a character" in refused(write(tmp_path / "b.jsonl", '{"text": "\\ud83d"}\n'))
    assert "cannot be told from others" in refused(
        jsonl(tmp_path / "c.jsonl", [{"text": "x", "g": None}]), Columns((Column("text"),), "g")
    )


def test_damaged_parquet(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": [f"{number} text" * 50 for number in range(2000)]}), whole, compression="snappy")
    raw = whole.read_bytes()
    assert "not a whole parquet file" in refused(write(tmp_path / "cut.parquet", raw[: len(raw) // 2]))
    damaged = bytearray(raw)
    damaged[100 : len(raw) // 2] = bytes(len(raw) // 2 - 100)
    assert "row group 0 cannot be read" in refused(write(tmp_path / "damaged.parquet", bytes(damaged)))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "holds no rows" in refused(tmp_path / "none.parquet")

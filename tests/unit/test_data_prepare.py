"""Preparing: from a job and files to rows on disk, once, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distft.config import Job, SourcesSection, SplitsSection
from distft.data import documents
from distft.data.card import describe
from distft.data.example import Column, Example
from distft.data.prepare import one_by_one, prepared_folder
from distft.data.splits import SPLITS
from distft.data.store import Prepared
from distft.errors import CapacityError, DataError
from distft.task.prepare import prepare, task_of
from tests.unit.tiny_data import WORDS, job, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("own_cache")


def with_data(one_job: Job, **settings: Any) -> Job:
    """The job with settings of the data section that this room knows and job files may not give yet."""
    return one_job.model_copy(update={"data": one_job.data.model_copy(update=settings)})


def split_of(prepared: Prepared) -> dict[tuple[str, int], str]:
    return {(one.source, one.row): split for split in SPLITS for one in prepared.documents(split)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_invariant_3_nothing_lost_every_row_ends_under_one_fate(tmp_path: Path, model_folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in texts(150, longest=120)]
    rows += [{"text": None}, {"text": ""}, {"text": " \n"}, {"text": "<|endoftext|>"}, {"text": rows[0]["text"]}]
    random.Random(0).shuffle(rows)
    write_jsonl(tmp_path / "a.jsonl", rows[:70])
    write_jsonl(tmp_path / "b.jsonl", rows[70:])
    for overlong, fate in (("drop", "dropped"), ("truncate", "truncated"), ("split", "split")):
        prepared = Prepared.open(prepare(job(tmp_path, overlong=overlong), model_folder))
        by_split = prepared.card["rows"]
        assert sum(sum(fates.values()) for fates in by_split.values()) == len(rows) == prepared.card["source"]["rows"]
        total: dict[str, int] = {}
        for fates in by_split.values():
            for name, count in fates.items():
                total[name] = total.get(name, 0) + count
        assert set(total) == {"kept", fate, "empty", "no_target"}
        assert (total["empty"], total["no_target"]) == (3, 1)
        assert by_split["none"] == {"empty": 3}
        table = pa.ipc.open_file(prepared.folder / "documents.arrow").read_all()
        wanted = [
            (name, row) for name, count in (("a.jsonl", 70), ("b.jsonl", len(rows) - 70)) for row in range(1, count + 1)
        ]
        assert list(zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True)) == wanted
        assert len(prepared.card["examples"]["empty"]) == 3


def test_invariant_3_nothing_lost_every_token_is_a_target_once(tmp_path: Path, model_folder: Path) -> None:
    everything = texts(80, longest=150)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in everything])
    for packing in (True, False):
        prepared = Prepared.open(prepare(job(tmp_path, packing=packing), model_folder))
        tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
        found: dict[int, list[tuple[int, ...]]] = {}
        for split in SPLITS:
            rows = prepared.rows(split)
            tokens = prepared.card["tokens"][split]
            everything_in = np.arange(len(rows))
            assert tokens["all"] == rows.tokens(everything_in) == sum(len(row.input_ids) for row in rows)
            assert (
                tokens["supervised"]
                == rows.supervised_tokens(everything_in)
                == sum(row.supervised.sum() for row in rows)
            )
            assert tokens["all"] + tokens["padding"] == 64 * len(rows) == 64 * prepared.card["packed"][split]
            for row in rows:
                assert len(row.input_ids) == sum(row.segments) <= 64
                assert len(row.segments) == 1 or packing
                start = 0
                for document, length in zip(row.documents, row.segments, strict=True):
                    assert row.supervised[start : start + length].tolist() == [False] + [True] * (length - 1)
                    found.setdefault(document, []).append(tuple(row.input_ids[start : start + length].tolist()))
                    start += length
            for one in prepared.documents(split):
                ids = [*tokenizer.encode(everything[one.row - 1]).ids, 0]
                targets = sorted(token for piece in found[one.index] for token in piece[1:])
                assert targets == sorted(ids[1:])
                assert one.tokens == len(ids)
                assert one.scored_bytes == len(everything[one.row - 1]) - len(tokenizer.decode(ids[:1]))
            assert prepared.card["scored_bytes"][split] == sum(one.scored_bytes for one in prepared.documents(split))
        assert sorted(found) == list(range(80))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.randoms(use_true_random=False), cut=st.integers(1, 49))
def test_order_and_names_of_files_do_not_matter(
    tmp_path: Path, model_folder: Path, draw: random.Random, cut: int
) -> None:
    everything = texts(50)
    plain, mixed = (tmp_path / name for name in ("plain", "mixed"))
    for folder in (plain, mixed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    write_jsonl(plain / "a.jsonl", [{"text": text} for text in everything])
    one = Prepared.open(prepare(job(plain), model_folder))
    shuffled = list(everything)
    draw.shuffle(shuffled)
    write_jsonl(mixed / "z.jsonl", [{"text": text} for text in shuffled[:cut]])
    write_jsonl(mixed / "c.jsonl", [{"text": text} for text in shuffled[cut:]])
    two = Prepared.open(prepare(job(mixed), model_folder))
    halves = {"z.jsonl": shuffled[:cut], "c.jsonl": shuffled[cut:], "a.jsonl": everything}
    where = [
        {halves[name][row - 1]: split for (name, row), split in split_of(prepared).items()} for prepared in (one, two)
    ]
    assert where[0] == where[1]
    assert one.fingerprint == two.fingerprint
    for split in SPLITS:
        rows = one.rows(split), two.rows(split)
        assert rows[0].ids.tolist() == rows[1].ids.tolist()
        assert [row.input_ids.tolist() for row in rows[0]] == [row.input_ids.tolist() for row in rows[1]]


def test_units_of_work_may_be_done_in_any_order(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "UNIT_BYTES", 2000)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(100)])
    table = pa.table({"text": texts(60, seed=1)})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=25)
    one_job = job(tmp_path, ["*.jsonl", "*.parquet"])
    plain = contents(prepare(one_job, model_folder))
    assert len([name for name in plain if name.startswith("tokens-")]) > 5
    table = pa.ipc.open_file(pa.BufferReader(plain["documents.arrow"])).read_all()
    assert table["row"].to_pylist() == [*range(1, 101), *range(1, 61)]
    shutil.rmtree(tmp_path / "cache")

    def backwards(planned: Mapping[int, Any], do: Any) -> Any:
        return reversed([do(number, unit) for number, unit in reversed(list(planned.items()))])

    again = prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), backwards)
    assert contents(again) == plain


def test_splits_do_not_depend_on_the_tokens(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    one, two = (Prepared.open(prepare(job(tmp_path, max_tokens=length), model_folder)) for length in (32, 200))
    assert split_of(one) == split_of(two)
    assert one.fingerprint != two.fingerprint
    assert split_of(Prepared.open(prepare(job(tmp_path, seed=18), model_folder))) != split_of(one)


def test_groups_stay_whole_and_strata_have_their_share(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": text, "who": number % 20, "kind": "ab"[number % 2]} for number, text in enumerate(texts(200))]
    write_jsonl(tmp_path / "a.jsonl", rows)
    shares = {"validation": 0.1, "test": 0.2}
    grouped = split_of(Prepared.open(prepare(job(tmp_path, splits={**shares, "group_by": "who"}), model_folder)))
    by_group = {rows[row - 1]["who"]: split for (_, row), split in grouped.items()}
    assert all(grouped["a.jsonl", row + 1] == by_group[one["who"]] for row, one in enumerate(rows))
    assert [list(by_group.values()).count(split) for split in SPLITS] == [14, 2, 4]
    stratified = split_of(Prepared.open(prepare(job(tmp_path, splits={**shares, "stratify_by": "kind"}), model_folder)))
    for kind in "ab":
        found = [stratified["a.jsonl", row + 1] for row, one in enumerate(rows) if one["kind"] == kind]
        assert [found.count(split) for split in SPLITS] == [70, 10, 20]


def test_invariant_6_copies_across_splits_are_counted_and_listed(tmp_path: Path, model_folder: Path) -> None:
    draw = random.Random(1)
    same = " ".join(draw.choices(WORDS, k=50))
    alike = [draw.choice(WORDS) + str(draw.random()) for _ in range(300)]
    for split, other in (("train", "here"), ("validation", "there"), ("test", "nowhere")):
        rows = [{"text": text} for text in [*texts(5, seed=len(split)), " ".join([*alike[:200], other, *alike[200:]])]]
        write_jsonl(tmp_path / f"{split}.jsonl", rows + [{"text": same}] * (2 if split == "train" else 1))
    source = SourcesSection(train="train.jsonl", validation="validation.jsonl", test="test.jsonl")
    card = Prepared.open(prepare(with_data(job(tmp_path), source=source), model_folder)).card
    exact, near = card["leaks"]["exact"], card["leaks"]["near"]
    assert exact["within"] == {"train": 1, "validation": 0, "test": 0}
    assert (exact["documents"], exact["pairs"]) == (2, 5)
    assert exact["listed"][0]["second"]["text"] == same[:80]
    assert (near["documents"], near["pairs"]) == (2, 3)
    text = " ".join(" ".join(alike).split())[:80]
    assert near["listed"][0]["first"] == {"split": "train", "source": "train.jsonl", "row": 6, "text": text}
    assert all(0.8 <= pair["similarity"] < 1 for pair in near["listed"])
    told = describe(card)
    assert len(told.splitlines()) <= 20
    assert "train train.jsonl:7 ~ validation validation.jsonl:7 (1.00)" in told


def test_random_splits_never_part_copies(tmp_path: Path, model_folder: Path) -> None:
    everything = texts(30)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in everything * 4])
    card = Prepared.open(prepare(job(tmp_path), model_folder)).card
    assert card["leaks"]["exact"]["documents"] == 0
    assert sum(card["leaks"]["exact"]["within"].values()) == 90


def test_a_second_time_costs_nothing_and_damage_is_repaired(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    one_job = job(tmp_path)
    folder = prepare(one_job, model_folder)
    before = contents(folder)

    def never() -> Any:
        raise AssertionError("nothing is to be built")

    assert prepared_folder(one_job, model_folder, never) == folder
    for damage in ("cut", "flip", "remove", "manifest"):
        path = folder / ("manifest.json" if damage == "manifest" else "tokens-00000-00000.arrow")
        raw = path.read_bytes()
        if damage in ("cut", "manifest"):
            path.write_bytes(raw[: len(raw) // 2])
        elif damage == "flip":
            path.write_bytes(raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:])
        else:
            path.unlink()
        if damage != "flip":
            with pytest.raises(DataError, match="damaged"):
                Prepared.open(folder)
        assert prepare(one_job, model_folder) == folder
        assert contents(folder) == before
    assert caplog.text.count("is made again") == 4


def test_reading_rows_imports_no_pandas(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    code = (
        "import sys; from pathlib import Path; from distft.data.store import Prepared;"
        "rows = list(Prepared.open(Path(sys.argv[1])).rows('train'));"
        "sys.exit(not rows or 'pandas' in sys.modules)"
    )
    folder = prepare(job(tmp_path), model_folder)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)


def test_the_key_is_of_content(tmp_path: Path, model_folder: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40)])
    first = prepare(job(tmp_path), model_folder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(model_folder, copy / "model")
    shutil.copy(path, copy / "a.jsonl")
    assert prepare(job(copy), copy / "model") == first
    write_jsonl(path, [{"text": text} for text in texts(41)])
    assert prepare(job(tmp_path), model_folder) != first
    (copy / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "x": 1}))
    assert prepare(job(copy), copy / "model") != first


@dataclass(frozen=True)
class Masked:
    """A stand-in for tasks that mask: a token is a target where its letter is in upper case."""

    columns: tuple[Column, ...] = (Column("text"),)
    facts: dict[str, Any] = field(default_factory=dict)

    def encode(self, rows: Sequence[tuple[str, ...]]) -> list[Example]:
        examples = []
        for (text,) in rows:
            mask = np.array([letter.isupper() for letter in text])
            ids = np.array([ord(letter) for letter in text], dtype=np.int32)
            examples.append(Example(ids, ((0, len(ids)),), "kept", int(mask[1:].sum()), mask))
        return examples


def test_invariant_5_masks_travel_with_their_tokens(tmp_path: Path, model_folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcXYZ", k=draw.randint(2, 20))) for _ in range(60)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": word} for word in words])
    prepared = Prepared.open(prepared_folder(job(tmp_path), model_folder, Masked))
    seen = 0
    for split in SPLITS:
        rows = prepared.rows(split)
        for row in rows:
            firsts = np.cumsum([0, *row.segments[:-1]])
            wanted = np.array([chr(token).isupper() for token in row.input_ids])
            wanted[firsts] = False
            assert row.supervised.tolist() == wanted.tolist()
            assert rows.supervised_tokens(np.array([row.index])) == wanted.sum()
            seen += len(row.segments)
    assert seen == 60


def test_invariant_5_data_without_a_target_is_refused(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"nothing {number}"} for number in range(40)])
    with pytest.raises(DataError, match=r"no token of the training split is a target(.|\n)*rows: a.jsonl row \d+, "):
        prepared_folder(job(tmp_path), model_folder, Masked)
    write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": None}])
    with pytest.raises(DataError, match="none of the 2 rows holds any text"):
        prepare(job(tmp_path), model_folder)
    assert not list((tmp_path / "cache" / "prepared").glob("*.building"))


def test_too_long_is_an_error_with_statistics(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(99, longest=100)])
    with pytest.raises(DataError, match=r"of 99 documents are longer than data.max_tokens = 64 tokens \(min \d+, med"):
        prepare(job(tmp_path, overlong="error"), model_folder)


def test_an_empty_split_and_a_file_in_two_splits_are_refused(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(4)])
    with pytest.raises(DataError, match="the validation split is empty: of 4 documents train 4, validation 0, test 0"):
        prepare(job(tmp_path), model_folder)
    no_test = SplitsSection(validation=0.25, test=0)
    prepared = Prepared.open(prepare(with_data(job(tmp_path), splits=no_test), model_folder))
    assert [len(prepared.rows(split)) > 0 for split in SPLITS] == [True, True, False]
    assert prepared.documents("test") == []
    write_jsonl(tmp_path / "b.jsonl", [{"text": None}])
    twice = SourcesSection(train="a.jsonl", validation="*a.jsonl", test="b.jsonl")
    with pytest.raises(DataError, match="in the train split and in the validation split"):
        prepare(with_data(job(tmp_path), source=twice), model_folder)
    write_jsonl(tmp_path / "c.jsonl", [{"text": "the people"}])
    blank = SourcesSection(train="a.jsonl", validation="c.jsonl", test="b.jsonl")
    with pytest.raises(DataError, match=r"the test split is empty(.|\n)*under data.source.test"):
        prepare(with_data(job(tmp_path), source=blank), model_folder)


def test_an_error_of_a_unit_arrives_as_itself(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(DataError, match="of type int, not text") as error:
        prepare(job(tmp_path), model_folder)
    assert "line 2" in str(error.value)


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(30)])

    def elsewhere(planned: Mapping[int, Any], do: Any) -> Any:
        shutil.rmtree(next((tmp_path / "cache" / "prepared").glob("*.building")))
        return one_by_one(planned, do)

    one_job = job(tmp_path)
    with pytest.raises(DataError, match=r"cannot be opened on .*\n.*every node must see"):
        prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), elsewhere)


def test_limit_takes_the_first_rows(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(30)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts(30, seed=1)])
    prepared = Prepared.open(prepare(job(tmp_path, limit=40), model_folder))
    assert sorted(split_of(prepared)) == [("a.jsonl", n) for n in range(1, 31)] + [("b.jsonl", n) for n in range(1, 11)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_an_error_with_figures(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(30)])

    def on_a_full_disk(planned: Mapping[int, Any], do: Any) -> Any:
        building = next((tmp_path / "cache" / "prepared").glob("*.building"))
        name = f"tokens-00000-00000.arrow.{platform.node()}-{os.getpid()}.partial"
        (building / name).symlink_to("/dev/full")
        return one_by_one(planned, do)

    one_job = job(tmp_path)
    with pytest.raises(CapacityError, match=r"the disk is full .* GB are free"):
        prepared_folder(one_job, model_folder, lambda: task_of(one_job, model_folder), on_a_full_disk)

"""Labels: found or given, numbered, put in their place in the rows, and refused where training lacks them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from distft.config import Job
from distft.data import labels
from distft.data.card import describe
from distft.data.splits import SPLITS
from distft.data.store import Prepared
from distft.errors import DataError
from distft.task.prepare import prepare
from tests.unit.tiny_data import job, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("own_cache")


def classify(folder: Path, given: list[str] | None = None, **data: Any) -> Job:
    return job(folder, task={"kind": "classification", "labels": given}, **{"overlong": "truncate", **data})


THREE = {split: f"{split}.jsonl" for split in SPLITS}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("given", [None, ["high", "low", "medium"]])
def test_a_label_stands_last_in_its_segment_and_is_the_only_target(
    tmp_path: Path, model_folder: Path, packing: bool, given: list[str] | None
) -> None:
    rows = [{"text": text, "label": ("low", "high")[number % 2]} for number, text in enumerate(texts(80, longest=120))]
    write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = Prepared.open(prepare(classify(tmp_path, given, packing=packing), model_folder))
    assert prepared.labels == tuple(given or ("high", "low"))
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    cut, seen = 0, 0
    for split in SPLITS:
        documents = {one.index: one for one in prepared.documents(split)}
        counted = dict.fromkeys(prepared.labels, 0)
        for row in prepared.rows(split):
            ends = np.cumsum(row.segments) - 1
            assert np.flatnonzero(row.supervised).tolist() == ends.tolist()
            for document, end, length in zip(row.documents, ends, row.segments, strict=True):
                source = rows[documents[document].row - 1]
                ids = tokenizer.encode(source["text"]).ids
                assert prepared.labels[row.input_ids[end]] == source["label"]
                assert row.input_ids[end - length + 1 : end].tolist() == ids[: 64 - 1]
                assert documents[document].tokens == len(ids)
                cut += max(len(ids) + 1 - 64, 0)
                counted[source["label"]] += 1
                seen += 1
        assert prepared.card["labels"]["rows"][split] == counted
    assert seen == 80
    truncated = sum(fates.get("truncated", 0) for fates in prepared.card["rows"].values())
    assert prepared.card["cut"] == {"text": {"documents": truncated, "tokens": cut}}
    assert truncated > 0
    told = describe(prepared.card)
    assert "labels of train: " in told
    assert f"cut off text: {cut:,} tokens in {truncated} documents" in told


def test_a_label_only_in_a_held_out_split_is_refused_with_its_rows(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts(30))]
    write_jsonl(tmp_path / "train.jsonl", rows[:10])
    write_jsonl(tmp_path / "validation.jsonl", rows[10:20])
    write_jsonl(tmp_path / "test.jsonl", [*rows[20:], {"text": "our land", "label": 2}, {"text": "land", "label": 2}])
    one_job = classify(tmp_path, source=THREE, splits={})
    with pytest.raises(DataError, match=r"2 documents have a label which no training document has: '2' in the test sp"):
        prepare(one_job, model_folder)
    with pytest.raises(DataError, match=r"test.jsonl row 11\), '2' in the test split \(test.jsonl row 12\)"):
        prepare(one_job, model_folder)
    with pytest.raises(DataError, match=r"which task\.labels does not name"):
        prepare(classify(tmp_path, ["0", "1"], source=THREE, splits={}), model_folder)
    given = Prepared.open(prepare(classify(tmp_path, ["2", "1", "0"], source=THREE, splits={}), model_folder))
    assert given.labels == ("2", "1", "0")
    assert given.card["labels"]["rows"]["train"] == {"2": 0, "1": 5, "0": 5}


def test_one_label_alone_is_refused(tmp_path: Path, model_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": "same"} for text in texts(30)])
    with pytest.raises(DataError, match="all training documents have the label 'same'"):
        prepare(classify(tmp_path), model_folder)


def test_rows_without_a_label_are_empty_and_named(tmp_path: Path, model_folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text, "label": number % 2} for number, text in enumerate(texts(40))]
    rows[3]["label"] = rows[7]["text"] = None
    write_jsonl(tmp_path / "a.jsonl", rows)
    card = Prepared.open(prepare(classify(tmp_path), model_folder)).card
    assert card["rows"]["none"] == {"empty": 2}
    assert card["examples"]["empty"] == [{"source": "a.jsonl", "row": row} for row in (4, 8)]
    assert "empty: 2 rows, a.jsonl row 4, a.jsonl row 8" in describe(card)


def test_what_a_label_is_called_is_content_and_what_it_is_called_by_order_too(
    tmp_path: Path, model_folder: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": number % 2} for number, text in enumerate(texts(40))])
    found = Prepared.open(prepare(classify(tmp_path), model_folder)).fingerprint
    assert Prepared.open(prepare(classify(tmp_path, ["0", "1"]), model_folder)).fingerprint == found
    assert Prepared.open(prepare(classify(tmp_path, ["1", "0"]), model_folder)).fingerprint != found
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": number % 3} for number, text in enumerate(texts(40))])
    assert Prepared.open(prepare(classify(tmp_path), model_folder)).fingerprint != found


def test_copies_of_a_text_with_different_labels_are_never_parted(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": text, "label": label} for text in texts(40) for label in ("yes", "no")]
    random.Random(0).shuffle(rows)
    write_jsonl(tmp_path / "a.jsonl", rows)
    leaks = Prepared.open(prepare(classify(tmp_path), model_folder)).card["leaks"]["exact"]
    assert leaks["documents"] == 0
    assert sum(leaks["within"].values()) == 40


@pytest.mark.parametrize(
    ("found", "wanted"),
    [(["10", "2", "-1"], ("-1", "2", "10")), (["b", "10", "2"], ("10", "2", "b")), (["01", "1"], ("01", "1"))],
)
def test_labels_are_sorted_as_numbers_where_all_are(found: list[str], wanted: tuple[str, ...]) -> None:
    codes = np.arange(len(found), dtype=np.int32)
    numbered = labels.number(codes, found, np.zeros(len(found), dtype=np.int8), None, lambda row: {})
    assert numbered.names == wanted
    assert [wanted[number] for number in numbered.numbers] == found

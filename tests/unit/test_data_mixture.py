"""Mixtures: a weight is how often a training document is used, and nothing else changes."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distft.data import digests
from distft.data.mixture import copies
from distft.data.splits import SPLITS
from distft.data.store import Prepared
from distft.task.prepare import prepare
from tests.unit.tiny_data import job, texts, tokenizer_folder, write_jsonl

WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]) | st.floats(0.05, 4)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("model"))


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(WEIGHTS, min_size=1, max_size=4, unique=True),
    count=st.integers(0, 120),
    seed=st.integers(0, 9),
    draw=st.randoms(use_true_random=False),
)
def test_weights_hold_for_each_source_wherever_its_documents_stand(
    weights: list[float], count: int, seed: int, draw: random.Random
) -> None:
    source = np.array([draw.randrange(len(weights)) for _ in range(count)], dtype=np.int32)
    training = np.array([draw.random() < 0.7 for _ in range(count)], dtype=bool)
    content = digests.array(b"".join(digests.digest(bytes([number])) for number in range(count)))
    times = copies(weights, source, content, training, seed)
    assert (times[~training] == 1).all()
    for number, weight in enumerate(weights):
        mine = times[training & (source == number)]
        assert {*mine.tolist()} <= {int(weight), int(weight) + (weight % 1 > 0)}
        assert abs(mine.sum() - weight * len(mine)) <= 0.5
    order = np.array(draw.sample(range(count), count), dtype=np.int64)
    assert (copies(weights, source[order], content[order], training[order], seed) == times[order]).all()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=st.tuples(WEIGHTS, WEIGHTS), packing=st.booleans(), seed=st.integers(0, 3))
def test_invariant_3_nothing_lost_every_row_of_a_mixture_has_one_fate(
    model_folder: Path, weights: tuple[float, float], packing: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setenv("DISTFT_CACHE", str(folder / "cache"))
        for place, file in enumerate("ab"):
            rows = [{"text": text} for text in texts(60, seed=place, longest=100)]
            write_jsonl(folder / f"{file}.jsonl", [*rows, {"text": ""}])
        mixture = [{"source": f"{file}.jsonl", "weight": weight} for file, weight in zip("ab", weights, strict=True)]
        plain = Prepared.open(prepare(job(folder, ["a.jsonl", "b.jsonl"], seed=seed, packing=packing), model_folder))
        mixed = Prepared.open(prepare(job(folder, mixture, seed=seed, packing=packing), model_folder))
        table = pa.ipc.open_file(mixed.folder / "documents.arrow").read_all().to_pydict()
        assert sum(sum(fates.values()) for fates in mixed.card["rows"].values()) == 122
        used: Counter[int] = Counter()
        for row in mixed.rows("train"):
            used.update(row.documents)
        segments: Counter[int] = Counter()
        for row in plain.rows("train"):
            segments.update(row.documents)
        weight_of = dict(zip(("a.jsonl", "b.jsonl"), weights, strict=True))
        for document, segment_count in segments.items():
            times = table["copies"][document]
            assert used[document] == times * segment_count
            assert times in (int(weight_of[table["source"][document]]), int(weight_of[table["source"][document]]) + 1)
            assert (table["fate"][document] == "left_out") == (times == 0)
        for split in SPLITS[1:]:
            assert mixed.rows(split).ids.tolist() == plain.rows(split).ids.tolist()
            assert [one.row for one in mixed.documents(split)] == [one.row for one in plain.documents(split)]


def test_copies_of_a_document_come_one_round_after_another(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(40, longest=15)])
    one_job = job(tmp_path, [{"source": "a.jsonl", "weight": 2}], packing=False)
    rows = [row.documents[0] for row in Prepared.open(prepare(one_job, model_folder)).rows("train")]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
    assert len({*rows}) == len(rows) // 2

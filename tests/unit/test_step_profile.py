"""What the profile of a step is made of, on a model small enough for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.step_profile import alone, as_table, batches, product_rate
from distft.model import IGNORED, LossModel

from .test_model_loss import tiny


def test_a_pass_is_divided_into_products_attention_and_the_rest(tmp_path: Path) -> None:
    ids = np.arange(64).reshape(1, 64)
    np.savez(tmp_path / "rows.npz", input_ids=ids, position_ids=ids % 32, labels=ids)
    (batch,) = batches(str(tmp_path / "rows.npz"))
    assert batch.labels[0].tolist() == [*range(1, 64), IGNORED]
    model = LossModel(tiny("llama"))
    found = alone(model.train(), batch, repeats=1)
    parts = found["profiled"]
    assert model.by_segments
    assert min(parts["products"], parts["attention"]) > 0
    assert parts["rest"] >= sum(parts["largest"].values()) > 0
    assert product_rate(model, 64) > 1e6
    one = {
        "step_seconds": 10.0,
        "passes": 2,
        "pass_alone": {"seconds": 3.0, "profiled": {"products": 2.0, "attention": 0.5}},
        "zero_seconds": 3.0,
        "update_seconds": 1.0,
        "products_at_that_rate_seconds": 5.0,
        "share_of_that_rate": 0.5,
    }
    assert "| a | 10.0 s | 4.0 s | 1.0 s | 1.0 s | 3.0 s | 1.0 s | 5.0 s, 50% |" in as_table({"a": one})

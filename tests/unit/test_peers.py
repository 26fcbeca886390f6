"""How the benchmark of peers chooses rows, and what it tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.peers import OUR_ZERO, as_table, full_rows, last_losses, summary
from distft.data.order import Order
from distft.data.store import Prepared
from tests.distributed import tiny


def test_a_run_meets_full_rows_only_and_in_its_own_order(tmp_path: Path, module_cache: None) -> None:
    tiny.make(tmp_path)
    job = tiny.job(tmp_path, train={"steps": 3, "batch_size": 2})
    rows = Prepared.open(tiny.prepare(tmp_path)).rows("train")
    seed, indices = full_rows(rows, job)
    assert all(rows[index].segments == (64,) for index in indices)
    order = Order.of(job.model_copy(update={"seed": seed}), len(rows))
    assert indices == np.concatenate([order.step(step) for step in range(3)]).tolist()
    assert any(rows[index].segments != (64,) for index in range(len(rows)))  # there was something to pass over


def test_figures_are_ratios_to_ours_and_losses_are_beside_them() -> None:
    trl = {"step_seconds": [9.0, 2.0, 4.0], "losses": [3.0, 2.2], "peak_memory_bytes": 4e9}
    runs = {
        "ours": [{"step_seconds": [9.0, 1.0, 1.0], "losses": [3.0, 2.0], "peak_memory_bytes": 1e9}],
        "trl": [{**trl, "supervised_tokens": [0, 100, 600]}],  # its rows are its own: 50 and 150 a second
    }
    result = {**summary(runs, [300, 300, 300]), "losses": last_losses(runs)}
    assert result["ours_over"]["trl"] == {"speed": 3.0, "memory": 0.25}
    assert result["losses"]["trl"]["last_over_ours"] == 2.2 / 2.0 - 1
    assert "| trl | 100 | 3.00 |  | 4.00 GB | 0.25 |  | 2.2000 (+1.0e-01) |" in as_table(result)


def test_the_settings_that_peers_get_are_those_of_the_engine() -> None:
    import torch

    from distft.engine import Settings, zero

    ours = zero._configuration(Settings(stage=2), torch.device("cpu"), own_norm=False)["zero_optimization"]
    assert ours.items() >= OUR_ZERO.items()

"""Invariant 2 over a base in four bits, at every ZeRO stage that takes one; its checkpoints hold the adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.checkpoint import weights
from tests.distributed import tiny
from tests.distributed.test_invariants import furthest
from tests.distributed.test_tasks import newest
from tests.support import run_ranks
from tests.unit.tiny_models import needs_bitsandbytes

pytestmark = [pytest.mark.distributed, needs_bitsandbytes]

ADAPTER = "model.adapter={kind: lora, rank: 2, alpha: 4, dora: true, quantize: nf4}"
STAGES = (0, 1, 2)


def train(folder: str) -> None:
    from distft.world import World

    home = Path(folder)
    for stage in STAGES:
        tiny.train(home, f"zero-{stage}", ADAPTER, f"zero.stage={stage}", "train.micro_batch_size=2")
    if World.from_environment().is_main:
        tiny.train(home, "plain", ADAPTER, kind="plain")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    tiny.make(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE", str(folder / "cache"))
        tiny.prepare(folder)
    run_ranks(train, 2, str(folder))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_invariant_2_loss(stage: int, trained: Path) -> None:
    expected, found = tiny.curve(trained, "plain"), tiny.curve(trained, f"zero-{stage}")
    assert sum(step["loss"] for step in expected[10:]) < sum(step["loss"] for step in expected[:10])
    for column in ("loss", "grad_norm"):
        assert furthest(found, expected, column) < 1e-5, column


def test_a_checkpoint_holds_the_adapter_alone(trained: Path) -> None:
    held = weights(newest(trained, "zero-2"))
    assert len(held) == 2 * 7 * 3  # two layers, seven targets; of each two matrices and DoRA's magnitude
    assert all("lora_" in name for name in held)

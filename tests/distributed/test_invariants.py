"""Invariants 1, 2, 5 and 6 of the contract over real processes, against the plain one-process engine."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distft.runs import Run
from distft.train.reporter import FileReporter, Record
from distft.world import World
from tests.distributed import tiny
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

#: (ranks, ZeRO stage, micro-batch): every stage on every number of ranks, every micro-batch at every stage.
FP32 = [
    (1, 0, 1), (1, 1, 2), (1, 2, 4), (1, 3, 2),
    (2, 0, 2), (2, 1, 4), (2, 2, 1), (2, 3, 4),
    (3, 0, 4), (3, 1, 1), (3, 2, 2), (3, 3, 1),
]  # fmt: skip
#: Four ranks, of which two by two hold the weights once more.
HPZ = [(4, 3, 1), (4, 3, 2)]
#: Ranks that share rows, two by two or all four; the last ones hold the weights once more besides.
SHARING = [(2, 2, 2, 2), (4, 0, 1, 4), (4, 1, 4, 2), (4, 3, 2, 2)]
BF16 = [(2, 0, 2), (2, 1, 1), (2, 2, 2), (2, 3, 4), (3, 2, 1)]
DROPOUT = [(2, 3, 2), (3, 0, 2)]


@dataclass(frozen=True)
class Configuration:
    """One run of the tiny model."""

    ranks: int
    stage: int
    micro_batch: int
    dtype: str = "fp32"
    kind: str = "zero"
    model: str = "model"
    hpz: int = 1
    sharing: int = 1

    @property
    def name(self) -> str:
        return "-".join(map(str, vars(self).values()))

    def settings(self) -> list[str]:
        return [
            f"zero.stage={self.stage}",
            f"train.micro_batch_size={self.micro_batch}",
            f"model.dtype={self.dtype}",
            f"cluster.workers={self.ranks}",
            f"zero.hpz_partition_size={self.hpz}",
            f"train.sequence_parallel_size={self.sharing}",
        ]


REFERENCE = Configuration(1, 0, 7, kind="plain")
REFERENCE_BF16 = Configuration(1, 0, 7, "bf16", kind="plain")
REFERENCE_DROPOUT = Configuration(1, 0, 2, kind="plain", model="dropout")
ALL = [
    REFERENCE,
    REFERENCE_BF16,
    REFERENCE_DROPOUT,
    *(Configuration(*configuration) for configuration in FP32),
    *(Configuration(*configuration, hpz=2) for configuration in HPZ),
    *(Configuration(*configuration, dtype="bf16") for configuration in BF16),
    Configuration(4, 3, 2, "bf16", hpz=2),
    *(Configuration(*one, hpz=2 if one[1] == 3 else 1, sharing=sharing) for *one, sharing in SHARING),
    Configuration(2, 2, 2, "bf16", sharing=2),
    *(Configuration(*configuration, model="dropout") for configuration in DROPOUT),
]


def train_all(folder: str, configurations: list[list[Any]]) -> None:
    for configuration in configurations:
        one = Configuration(*configuration)
        tiny.train(Path(folder), one.name, *one.settings(), kind=one.kind, model=one.model)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def curves(made: Path) -> dict[Configuration, list[dict[str, Any]]]:
    """The training steps of all configurations: one set of processes per number of ranks."""
    for ranks in (1, 2, 3, 4):
        run_ranks(train_all, ranks, str(made), [list(vars(c).values()) for c in ALL if c.ranks == ranks])
    return {one: tiny.curve(made, one.name) for one in ALL}


def furthest(curve: list[dict[str, Any]], reference: list[dict[str, Any]], name: str) -> float:
    """The largest relative difference of a column."""
    assert len(curve) == len(reference) == 20
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(curve, reference, strict=True))


def test_invariant_1_order(curves: dict[Configuration, list[dict[str, Any]]]) -> None:
    expected = [step["sample_digest"] for step in curves[REFERENCE]]
    assert len(set(expected)) == 20
    assert curves[REFERENCE][-1]["rows"] == 3
    for one, curve in curves.items():
        assert [step["sample_digest"] for step in curve] == expected, one


@pytest.mark.parametrize(
    ("dtype", "reference", "tolerance"),
    [("fp32", REFERENCE, 1e-5), ("bf16", REFERENCE_BF16, 1e-2), ("fp32", REFERENCE_DROPOUT, 1e-5)],
    ids=["fp32", "bf16", "dropout"],
)
@pytest.mark.parametrize("column", ["loss", "grad_norm"])
def test_invariant_2_loss(
    curves: dict[Configuration, list[dict[str, Any]]],
    dtype: str,
    reference: Configuration,
    tolerance: float,
    column: str,
) -> None:
    compared = [one for one in ALL if one.kind == "zero" and (one.dtype, one.model) == (dtype, reference.model)]
    differences = {one.name: furthest(curves[one], curves[reference], column) for one in compared}
    assert len(differences) >= 2
    assert max(differences.values()) < tolerance, differences


def test_validation_is_the_same_however_rows_are_dealt(made: Path, curves: dict[Configuration, Any]) -> None:
    del curves  # they are there
    losses = {one: [line["loss"] for line in tiny.validations(made, one.name)] for one in ALL if one.dtype == "fp32"}
    expected = {model: losses[one] for model, one in (("model", REFERENCE), ("dropout", REFERENCE_DROPOUT))}
    assert all(len(one) == 2 for one in expected.values())
    for one, found in losses.items():
        assert found == pytest.approx(expected[one.model], rel=1e-5), one


def test_it_learns_and_norms_are_those_before_clipping(curves: dict[Configuration, list[dict[str, Any]]]) -> None:
    curve = curves[REFERENCE]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
    assert max(step["grad_norm"] for step in curve) > 1.0


# --- the same digits: twice, and through a kill and a resume ---

SAME = [
    Configuration(2, 3, 2, sharing=2),
    *(Configuration(2, stage, 2, dtype) for dtype in ("bf16", "fp32") for stage in (0, 1, 2, 3)),
]


class Gone(Exception):
    """A run that ended where no program could clean up after it."""


class Until(FileReporter):
    """Reports, and ends the process or the run after a step."""

    def __init__(self, run: Run, *, is_main: bool, kill: bool, step: int = 8) -> None:
        super().__init__(run, is_main=is_main)
        self._kill, self._last = kill, step

    def train(self, record: Record) -> None:
        super().train(record)
        if record["step"] == self._last:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Gone


def train_same(folder: str, suffix: str, end: str) -> None:
    """Trains all of SAME; ``end`` is "whole", "broken" (the last one by SIGKILL) or "resumed"."""
    home = Path(folder)
    for one in SAME:
        name = f"{suffix}-{one.name}"
        settings = [*one.settings(), "train.epochs=null", "train.steps=12", "checkpoint.every={steps: 6}"]
        if end != "broken":
            tiny.train(home, name, *settings, resume=end == "resumed")
            continue
        reporter = Until(tiny.run_of(home, name), is_main=World.from_environment().is_main, kill=one == SAME[-1])
        with pytest.raises(Gone):
            tiny.train(home, name, *settings, reporter=reporter)


def test_invariant_2_same_digits_twice_and_after_a_kill(home: Path) -> None:
    run_ranks(train_same, 2, str(home), "a", "whole")
    run_ranks(train_same, 2, str(home), "b", "broken", expect=-signal.SIGKILL)
    assert len(tiny.curve(home, f"b-{SAME[-1].name}")) == 8
    run_ranks(train_same, 2, str(home), "b", "resumed")
    for one in SAME:
        whole, resumed = (tiny.curve(home, f"{suffix}-{one.name}") for suffix in ("a", "b"))
        assert len(whole) == len(resumed) == 12
        for column in ("loss", "grad_norm", "sample_digest", "learning_rate"):
            assert [step[column] for step in whole] == [step[column] for step in resumed], (one, column)


# --- masks ---


def empty_batches(folder: str) -> list[list[Any]]:
    """Gradient norms and losses with and without unsupervised micro-batches, at each stage."""
    import torch

    from distft import engine as engines
    from distft.model import Batch, LossModel, load_model

    world = World.from_environment()
    draw = torch.Generator().manual_seed(5 + world.rank)
    ids = torch.randint(2, 200, (2, 24), generator=draw)
    real = Batch(ids, torch.arange(24).expand(2, 24).contiguous(), ids.roll(-1, 1))
    unsupervised = Batch(real.input_ids, real.position_ids, torch.full_like(ids, -100))
    found = []
    for stage in (0, 1, 2, 3):
        for batches in ([real], [unsupervised, real, Batch.empty(1)], [unsupervised, Batch.empty(1)]):
            model = LossModel(load_model(Path(folder) / "model", torch.float32))
            engine = engines.open(model, engines.Settings(stage=stage), world)
            losses = [
                float(engine.forward_backward(batch, 1 / 92, last=batch is batches[-1], seed=0).sum())
                for batch in batches
            ]
            norm = engine.step(1e-3)
            after = float(engine.losses(real).sum())
            found.append([stage, losses, norm, after])
            engine.close()
    return found


def test_invariant_5_masks(made: Path) -> None:
    for found in run_ranks(empty_batches, 2, str(made)):
        for stage in range(4):
            (_, (loss,), norm, after), mixed, empty = found[3 * stage : 3 * stage + 3]
            assert mixed[1] == [0.0, loss, 0.0]
            assert mixed[2:] == [pytest.approx(norm, rel=1e-6), pytest.approx(after, rel=1e-6)]
            assert norm > 0
            assert empty[1] == [0.0, 0.0]
            assert empty[2] == 0.0
            assert empty[3] == pytest.approx(loss, rel=1e-6)  # nothing was learnt
            assert after < loss
            assert all(math.isfinite(value) for value in (norm, after, empty[3]))


# --- the sealed test split ---


def train_sealed(folder: str) -> None:
    tiny.train(Path(folder), "sealed", *REFERENCE.settings(), kind="plain")


def test_invariant_6_sealed_test(curves: dict[Configuration, list[dict[str, Any]]], home: Path) -> None:
    (rows,) = (home / "cache" / "prepared").glob("*/rows-test.arrow")
    rows.write_bytes(b"\0" * rows.stat().st_size)  # whoever opens it fails
    run_ranks(train_sealed, 1, str(home))
    assert [step["loss"] for step in tiny.curve(home, "sealed")] == [step["loss"] for step in curves[REFERENCE]]

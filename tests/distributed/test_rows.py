"""Invariants 3 and 4 of the contract over real processes: every row is used, and packed examples do not meet."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.data.store import Prepared, Row
from distft.train import loop
from distft.world import World
from tests.distributed import tiny
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

EPOCHS = 2
STAGES = (0, 1, 2, 3)


def prepared_of(home: Path) -> Prepared:
    (folder,) = (path for path in (home / "cache" / "prepared").iterdir() if path.is_dir())
    return Prepared.open(folder)


# --- nothing lost ---


@contextmanager
def recorded(fed: dict[int, list[int]]) -> Iterator[None]:
    """Writes down which rows this rank gives to its engine in each step; a step that is redone counts once."""
    original: Callable[..., Any] = loop._row_losses

    def losses(
        training: loop.Training, number: int, indices: loop.Indices, micro_batches: list[loop.Indices], *rest: Any
    ) -> Any:
        fed[number] = np.concatenate(micro_batches).tolist()
        return original(training, number, indices, micro_batches, *rest)

    loop._row_losses = losses
    try:
        yield
    finally:
        loop._row_losses = original


class Gone(Exception):
    """A run that was broken off."""


class UntilStep:
    """Breaks the run off after a step, on every rank."""

    def __init__(self, last: int) -> None:
        self._last = last

    def train(self, record: dict[str, Any]) -> None:
        if record["step"] == self._last:
            raise Gone

    def validation(self, record: dict[str, Any]) -> None:
        pass

    def event(self, record: dict[str, Any]) -> None:
        pass

    def row_losses(self, first: int, losses: Any) -> None:
        pass


def train_two_epochs(folder: str) -> dict[int, list[int]]:
    """What this rank was fed, by step: two epochs, broken off after step 9 and resumed from the checkpoint of 6."""
    settings = [f"train.epochs={EPOCHS}", "train.micro_batch_size=2", "checkpoint.every={steps: 6}", "zero.stage=2"]
    name = f"rows-{World.from_environment().size}"
    fed: dict[int, list[int]] = {}
    with recorded(fed):
        with pytest.raises(Gone):
            tiny.train(Path(folder), name, *settings, reporter=UntilStep(9))
        tiny.train(Path(folder), name, *settings, resume=True)
    return fed


@pytest.mark.parametrize("ranks", [2, 3])
def test_invariant_3_nothing_lost(home: Path, ranks: int) -> None:
    prepared = prepared_of(home)
    fates = prepared.card["rows"].values()
    assert sum(sum(one.values()) for one in fates) == 90  # the documents of the corpus
    rows = len(prepared.rows("train"))
    fed = run_ranks(train_two_epochs, ranks, str(home))
    used = Counter(index for rank in fed for indices in rank.values() for index in indices)
    assert used == dict.fromkeys(range(rows), EPOCHS)
    for epoch in range(EPOCHS):  # and each epoch by itself, as far as whole steps tell
        steps = range(math.ceil(epoch * rows / 7) + 1, (epoch + 1) * rows // 7 + 1)
        within = [index for rank in fed for step in steps for index in rank.get(str(step), [])]
        assert len(within) == len(set(within)) == 7 * len(steps)


# --- isolation ---


def losses_of_neighbours(folder: str) -> list[list[float]]:
    """For each stage: the largest change of a neighbour's loss, of the changed example's, and of the loss sum.

    Each rank changes the middle example of a packed row of its own, after one update of the weights. Control: with
    positions that run on through the row, the neighbours do hear of it.
    """
    import torch

    from distft import engine as engines
    from distft.model import Batch, LossModel, load_model

    world = World.from_environment()
    rows = [row for row in prepared_of(Path(folder)).rows("train") if len(row.segments) >= 3]
    row = rows[world.rank]
    start = row.segments[0]
    middle = slice(start, start + row.segments[1])
    ids = row.input_ids.copy()
    ids[middle] = (ids[middle] + 7) % 200 + 2
    quiet = row.supervised.copy()
    quiet[middle] = False  # the sum of the neighbours' losses alone

    def batch(changed: Row) -> Batch:
        return Batch.collate([changed], 1)

    found = []
    for stage in STAGES:
        model = LossModel(load_model(Path(folder) / "model", torch.float32))
        engine = engines.open(model, engines.Settings(stage=stage), world)
        engine.forward_backward(batch(row), 0.01, last=True, seed=0)
        engine.step(1e-2)
        before, after = (engine.losses(batch(one))[0] for one in (row, replace(row, input_ids=ids)))
        change = ((after - before).abs() / before.abs().clamp(min=1e-3)).tolist()
        sums = [
            float(engine.forward_backward(batch(replace(one, supervised=quiet)), 0.01, last=False, seed=0))
            for one in (row, replace(row, input_ids=ids))
        ]
        through = [
            replace(batch(one), position_ids=torch.arange(len(ids))[None]) for one in (row, replace(row, input_ids=ids))
        ]
        control = (engine.losses(through[1])[0] - engine.losses(through[0])[0]).abs().tolist()
        # Position t holds the loss of token t + 1, so the example before ends a position earlier.
        found.append(
            [
                max(itertools.chain(change[: start - 1], change[middle.stop :])),
                max(change[middle]),
                abs(sums[1] / sums[0] - 1),
                max(control[middle.stop :]),
            ]
        )
        engine.close()
    return found


def test_invariant_4_isolation(made: Path) -> None:
    for found in run_ranks(losses_of_neighbours, 2, str(made)):
        for neighbours, changed, loss_sum, control in found:
            assert neighbours < 1e-6
            assert loss_sum < 1e-6
            assert changed > 1e-2
            assert control > 1e-3

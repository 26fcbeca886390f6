"""Copies of what a rank holds."""

from __future__ import annotations

import torch

from distft.engine.pieces import Holding, snapshot
from distft.engine.protocol import Snapshot


def bits(taken: Snapshot) -> dict[str, list[float]]:
    return {f"{piece.name}/{kind}": tensor.tolist() for piece in taken.pieces for kind, tensor in piece.tensors.items()}


def test_memory_of_an_older_snapshot_holds_the_new_one() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    holding = Holding("w", (6,), 1, 4, weight, 1)
    first = snapshot(optimizer, [holding]).wait()
    weight.grad = torch.ones(6)
    optimizer.step()
    fresh = snapshot(optimizer, [holding]).wait()
    again = snapshot(optimizer, [holding], into=first).wait()
    assert bits(again) == bits(fresh) != {}
    assert again.updates == fresh.updates == 1
    assert again.pieces[0].tensors["weight"].data_ptr() == first.pieces[0].tensors["weight"].data_ptr()
    larger = Holding("w", (6,), 1, 5, weight, 1)  # of another shape: memory of its own
    other = snapshot(optimizer, [larger], into=again).wait()
    assert other.pieces[0].tensors["weight"].tolist() == weight[1:6].tolist()

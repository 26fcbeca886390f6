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
    first = snapshot(optimizer, [holding])
    weight.grad = torch.ones(6)
    optimizer.step()
    fresh = snapshot(optimizer, [holding])
    again = snapshot(optimizer, [holding], into=first)
    assert bits(again) == bits(fresh) != {}
    assert again.updates == fresh.updates == 1
    assert again.pieces[0].tensors["weight"].data_ptr() == first.pieces[0].tensors["weight"].data_ptr()
    other = snapshot(
        optimizer, [Holding("w", (6,), 1, 5, weight, 1)], into=again
    )  # of another shape: memory of its own
    assert other.pieces[0].tensors["weight"].tolist() == weight[1:6].tolist()

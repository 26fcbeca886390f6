"""Copies of what a rank holds."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distft.engine.pieces import Holding, snapshot
from distft.engine.protocol import Snapshot


def bits(taken: Snapshot) -> dict[str, list[float]]:
    return {f"{piece.name}/{piece.kind}": piece.tensor.tolist() for piece in taken.pieces}


def stepped() -> tuple[torch.nn.Parameter, torch.optim.AdamW, Holding]:
    """A weight that has been updated once, and a part of it."""
    weight = torch.nn.Parameter(torch.arange(6.0))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(6)
    optimizer.step()
    return weight, optimizer, Holding("w", (6,), 1, 4, weight, 1)


def test_memory_of_an_older_snapshot_holds_the_new_one() -> None:
    weight, optimizer, holding = stepped()
    first = snapshot(optimizer, [holding]).hold()
    optimizer.step()
    fresh = snapshot(optimizer, [holding]).hold()
    again = snapshot(optimizer, [holding], into=first).hold()
    assert bits(again) == bits(fresh) != {}
    assert again.updates == fresh.updates == 2
    assert again.pieces[0].tensor.data_ptr() == first.pieces[0].tensor.data_ptr()
    larger = Holding("w", (6,), 1, 5, weight, 1)  # of another shape: memory of its own
    other = snapshot(optimizer, [larger], into=again).hold()
    assert other.pieces[0].tensor.tolist() == weight[1:6].tolist()


def test_moments_that_no_update_has_made_are_zeros_of_no_memory() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0))
    taken = snapshot(torch.optim.AdamW([weight], lr=0.1), [Holding("w", (6,), 0, 6, weight, 0)]).hold()
    assert bits(taken) == {"w/weight": [0, 1, 2, 3, 4, 5], "w/exp_avg": [0] * 6, "w/exp_avg_sq": [0] * 6}
    assert taken.pieces[1].tensor.untyped_storage().nbytes() == 4


def test_only_what_is_not_read_before_an_update_is_copied() -> None:
    weight, optimizer, holding = stepped()
    taken = snapshot(optimizer, [holding])
    whole, parts = bits(taken), taken.stream()
    found = [next(parts).tolist(), next(parts).tolist()]
    taken.hold()
    with torch.no_grad():
        for own in (weight, *optimizer.state[weight].values()):
            own.zero_()  # an update, as far as the snapshot can see
    found += [part.tolist() for part in parts]
    assert found == list(whole.values())
    assert [piece.lent for piece in taken.pieces] == [True, False, False]


def test_an_update_waits_for_no_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.engine.snapshot.CHUNK", 1)
    weight, optimizer, holding = stepped()
    taken = snapshot(optimizer, [holding])
    whole, found, go_on = bits(taken), list[float](), threading.Event()

    def write() -> None:
        for part in taken.stream():
            found.append(part.item())
            go_on.wait()  # a network that hangs

    writing = threading.Thread(target=write)
    writing.start()
    while not found:
        time.sleep(0.01)
    taken.hold()
    with torch.no_grad():
        weight.zero_()
    go_on.set()
    writing.join(30)
    assert found == [*whole["w/weight"], *whole["w/exp_avg"], *whole["w/exp_avg_sq"]]

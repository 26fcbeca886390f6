"""What a rank holds of a model and its optimizer: found among the optimizer's tensors, copied out, and filled again.

The same for every engine and every ZeRO stage, once it is known where each parameter's elements lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distft.engine.protocol import KINDS, StateReader
from distft.engine.snapshot import CHUNK, Piece, Snapshot


@dataclass(frozen=True)
class Holding:
    """A run of one flattened parameter, and where the optimizer keeps it.

    Attributes:
        name: The parameter's name in the model.
        shape: Of the whole parameter.
        start: The run's first element in the flattened parameter.
        elements: Its length.
        owner: The tensor that the optimizer steps: the parameter, its fp32 copy, or many parameters' end to end.
        offset: The run's first element in the flattened owner.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    elements: int
    owner: Tensor
    offset: int

    def share(self, rank: int, size: int) -> Holding:
        """The part of it that one of ``size`` ranks writes where all of them hold the same."""
        first, end = self.elements * rank // size, self.elements * (rank + 1) // size
        return replace(self, start=self.start + first, offset=self.offset + first, elements=end - first)

    def of(self, tensor: Tensor) -> Tensor:
        """The run within a tensor that is laid out as its owner is, as a view: (elements,)."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.elements]


def snapshot(optimizer: torch.optim.Optimizer, holdings: Sequence[Holding], into: Snapshot | None = None) -> Snapshot:
    """What the holdings are now; moments that no update has made yet are zeros.

    Args:
        optimizer: Whose state it is.
        holdings: What is wanted.
        into: As for :class:`Snapshot`.
    """
    updates = max((int(state["step"]) for state in optimizer.state.values() if state), default=0)
    return Snapshot((_piece(optimizer, one, kind) for kind in KINDS for one in holdings if one.elements), updates, into)


def _piece(optimizer: torch.optim.Optimizer, one: Holding, kind: str) -> Piece:
    whole = one.owner if kind == "weight" else optimizer.state.get(one.owner, {}).get(kind)
    if whole is not None:
        return Piece(kind, one.name, one.shape, one.start, one.of(whole))
    zeros = torch.zeros(1, dtype=one.owner.dtype).expand(one.elements)  # of one element's memory
    return Piece(kind, one.name, one.shape, one.start, zeros, lent=False)


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, holdings: Sequence[Holding], state: StateReader) -> None:
    """Fills the holdings, and sets Adam's count of updates; what is kept beside them in bf16 is not touched.

    Raises:
        CheckpointError: The state lacks something, or cannot be read.
    """
    for one in holdings:
        moments = _moments(optimizer, one.owner, state.updates)
        for kind in KINDS:
            target = one.of(one.owner if kind == "weight" else moments[kind])
            for first, end in _chunks(one.elements):
                target[first:end].copy_(state.read(one.name, kind, one.start + first, one.start + end))


def _chunks(elements: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + CHUNK, elements)) for first in range(0, elements, CHUNK))


def _moments(optimizer: torch.optim.Optimizer, owner: Tensor, updates: int) -> dict[str, Tensor]:
    """The optimizer's state of a tensor; made as AdamW makes it at its first step, where there is none."""
    state: dict[str, Tensor] = optimizer.state[owner]
    if not state:
        state["step"] = _counter(optimizer, owner)
        state["exp_avg"] = torch.zeros_like(owner)
        state["exp_avg_sq"] = torch.zeros_like(owner)
    if isinstance(state["step"], Tensor):
        state["step"].fill_(updates)
    else:
        state["step"] = updates
    return state


def _counter(optimizer: torch.optim.Optimizer, owner: Tensor) -> Tensor:
    """Torch counts in a tensor, on the device where it is fused; DeepSpeed's AdamW for the CPU in an int."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return 0  # type: ignore[return-value]
    return torch.zeros((), device=owner.device if optimizer.defaults["fused"] else "cpu")

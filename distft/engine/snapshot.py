"""What one rank holds of a model and its optimizer at a moment, to be written beside training."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements that are read at a time: saving and restoring take this much memory beside the state itself.
CHUNK = 2**22


@dataclass
class Piece:
    """A run of one flattened parameter, or of Adam's moments of it: what one rank holds of it.

    It says nothing of ranks or stages, so any number of ranks at any stage can take up what others left.

    Attributes:
        kind: ``weight`` (the optimizer's own: fp32, fp64 in an fp64 reference), ``exp_avg`` or ``exp_avg_sq`` (Adam's
            moments, https://arxiv.org/abs/1412.6980).
        name: The parameter's name in the model, as ``model.named_parameters()`` has it.
        shape: Of the whole parameter.
        start: The run's first element in the flattened parameter.
        tensor: The run: (elements,).
        lent: Whether the tensor is the optimizer's own, which an update changes.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    lent: bool = True


class Snapshot:
    """What one rank holds, as it is now, while training goes on.

    On a GPU a copy into host memory is begun at once, in a thread. On a CPU the optimizer's own tensors are read until
    an update comes: only what is not written by then is copied (:meth:`hold`), which takes no memory where storage is
    faster than a step. Passes leave the state as it is (Mohan et al., CheckFreq, FAST 2021).

    Args:
        pieces: In the order in which they are read. Over all ranks they make up every trained parameter exactly once.
        updates: Updates that the optimizer has made (Adam's t).
        into: One of before that nobody needs any more: the memory of its copies is used again, since new memory takes
            longer to get than to fill.
    """

    def __init__(self, pieces: Iterable[Piece], updates: int, into: Snapshot | None = None) -> None:
        self.pieces = tuple(pieces)
        self.updates = updates
        self._room: dict[tuple[str, str, int], Tensor] = {} if into is None else into._room
        self._read = 0  # of the pieces
        self._reading = threading.Lock()
        beside = ThreadPoolExecutor(1, "snapshot")
        away = [piece for piece in self.pieces if piece.tensor.device.type != "cpu"]
        self._fetched = beside.submit(self._copy, away)
        beside.shutdown(wait=False)  # the thread ends when it has copied

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.tensor.nbytes for piece in self.pieces)

    def stream(self) -> Iterator[Tensor]:
        """All tensors' elements, in order, some at a time; once, in any thread."""
        self._fetched.result()
        for piece in self.pieces:
            for first in range(0, piece.tensor.numel(), CHUNK):
                with self._reading:
                    part = piece.tensor[first : first + CHUNK]
                    if piece.lent:  # else an update would wait for whoever writes it, who may wait for a network
                        part = part.clone()
                yield part
            self._read += 1

    def hold(self) -> Snapshot:
        """Itself, once it no longer changes with the optimizer's state: an update or a restore may come."""
        self._fetched.result()
        with self._reading:
            self._copy([piece for piece in self.pieces[self._read :] if piece.lent])
        return self

    def _copy(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            key, source = (piece.kind, piece.name, piece.start), piece.tensor
            room = self._room.get(key)
            if room is None or (room.numel(), room.dtype) != (source.numel(), source.dtype):
                room = self._room[key] = torch.empty(source.numel(), dtype=source.dtype)
            piece.tensor, piece.lent = room.copy_(source), False

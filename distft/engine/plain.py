"""The reference: one process, torch only, and nothing that can be left out.

Slow and plain on purpose; ZeRO 0 to 3 on any number of ranks must give the same losses and gradient norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distft.engine import pieces
from distft.engine.clip import clip
from distft.engine.memory import peak_memory_bytes
from distft.engine.protocol import Settings, StateReader, parameter_groups, row_losses
from distft.engine.snapshot import Snapshot
from distft.model import Batch, LossModel
from distft.world import World


class PlainEngine:
    """AdamW in one process; fp64 and fp32 directly, bf16 with gradients summed into fp32 master weights.

    Args:
        model: The model, on the CPU; it is moved and cast in place.
        settings: Stage and offload are without meaning here.
    """

    def __init__(self, model: LossModel, settings: Settings) -> None:
        self.world = World()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._settings = settings
        self._model = model.to(self.device)
        for parameter in model.parameters():
            if parameter.is_floating_point():  # quantised weights are not
                parameter.data = parameter.data.to(settings.dtype)
        self._weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = parameter_groups(model, settings.weight_decay)
        self._masters: list[Tensor] = list(self._weights)
        if settings.dtype == torch.bfloat16:
            pairs = {weight: weight.detach().float().requires_grad_() for weight in self._weights}
            self._masters = [pairs[weight] for weight in self._weights]
            groups = [{**group, "params": [pairs[weight] for weight in group["params"]]} for group in groups]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0)

    def forward_backward(self, batch: Batch, scale: float, *, last: bool, seed: int) -> Tensor:
        """See :class:`~distft.engine.protocol.Engine`."""
        torch.manual_seed(seed)
        self._model.train()
        loss, rows = self._model(batch.to(self.device))
        (loss * scale).backward()
        if self._settings.dtype == torch.bfloat16:
            self._move_gradients_to_masters()
        return row_losses(batch, rows)

    def _move_gradients_to_masters(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def step(self, learning_rate: float) -> float:
        """See :class:`~distft.engine.protocol.Engine`."""
        norm = clip(self._masters, self._settings.max_grad_norm)
        if torch.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._copy_masters_to_weights()
        self._optimizer.zero_grad()
        return norm.item()

    def _copy_masters_to_weights(self) -> None:
        if self._settings.dtype == torch.bfloat16:
            for weight, master in zip(self._weights, self._masters, strict=True):
                weight.data.copy_(master.data)

    def losses(self, batch: Batch) -> Tensor:
        """See :class:`~distft.engine.protocol.Engine`."""
        return self.scores(batch)[0]

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`~distft.engine.protocol.Engine`."""
        self._model.eval()
        return self._model.scores(batch.to(self.device))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return list(values)

    def broadcast(self, value: Any) -> Any:
        """See :class:`~distft.engine.protocol.Engine`."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return [value]

    def gather_aside(self, value: Any) -> list[Any]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return [value]

    def barrier(self) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """See :class:`~distft.engine.protocol.Engine`."""
        return pieces.snapshot(self._optimizer, self._holdings(), into)

    def restore(self, state: StateReader) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        pieces.restore(self._optimizer, self._holdings(), state)
        self._copy_masters_to_weights()

    def _holdings(self) -> list[pieces.Holding]:
        names = {id(weight): name for name, weight in self._model.model.named_parameters()}
        return [
            pieces.Holding(names[id(weight)], tuple(weight.shape), 0, weight.numel(), master, 0)
            for weight, master in zip(self._weights, self._masters, strict=True)
        ]

    def state_bytes(self) -> int:
        """See :class:`~distft.engine.protocol.Engine`."""
        return 3 * sum(master.numel() * master.element_size() for master in self._masters)

    def peak_memory_bytes(self) -> int:
        """See :class:`~distft.engine.protocol.Engine`."""
        return peak_memory_bytes()

    def close(self) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        del self._model, self._optimizer, self._weights, self._masters

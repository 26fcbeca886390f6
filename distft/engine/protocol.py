"""What training asks of an engine, and the settings that one is opened with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distft.engine.snapshot import Snapshot
from distft.model import Batch
from distft.world import World


@dataclass(frozen=True)
class Settings:
    """How an engine trains.

    Attributes:
        dtype: Type of weights and activations; the optimizer keeps fp32 weights beside bf16 ones.
        stage: ZeRO stage 0 .. 3 (https://arxiv.org/abs/1910.02054): which of optimizer state, gradients and weights
            are split between ranks.
        offload: Where optimizer state lives: ``none`` (on the device) or ``cpu``.
        weight_decay: AdamW's, applied to matrices only.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them.
        hpz_partition_size: Ranks that hold a second copy of stage 3's weights between them (ZeRO++'s hpZ,
            https://arxiv.org/abs/2306.10209, section 3.2); a divisor of the number of ranks, 1 for none.
        sequence_parallel_size: Ranks, one after the other, that share rows (:mod:`distft.engine.sequence`): they are
            given the same batches, and each passes its part of the tokens.
    """

    dtype: torch.dtype = torch.float32
    stage: int = 0
    offload: str = "none"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    hpz_partition_size: int = 1
    sequence_parallel_size: int = 1


#: What is kept of a trained parameter.
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class StateReader(Protocol):
    """The state of a whole model, read piece by piece: from a checkpoint's files, whoever wrote them."""

    @property
    def updates(self) -> int:
        """Updates that the optimizer had made."""
        ...

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened parameter's ``weight``, ``exp_avg`` or ``exp_avg_sq``."""
        ...


class Engine(Protocol):
    """A model and its optimizer over all ranks. Every rank calls every method but ``device`` equally often.

    Legend: B rows, T tokens.
    """

    world: World
    device: torch.device

    def forward_backward(self, batch: Batch, scale: float, *, last: bool, seed: int) -> Tensor:
        """Adds a micro-batch to the gradient of the step.

        Over all ranks and passes the gradient is that of ``scale`` times the sum of all token losses: with ``scale``
        one over the supervised tokens of the global batch it does not depend on how the batch is divided.

        Args:
            batch: The micro-batch; ``Batch.empty`` where this rank has none.
            scale: What the loss is multiplied with.
            last: Whether this is the step's last pass.
            seed: Seeds dropout, so that it is a function of the step and the micro-batch, not of the rank.

        Returns:
            The sum of each row's token losses, unscaled: (B,) in fp64, 0 for a row without any; (0,) for an empty
            batch. It is on the device, which need not be done with the pass yet. Of ranks that share rows each has
            the sum of its own tokens.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Updates the weights; returns the gradient norm over all ranks before clipping.

        Where the norm is not finite the weights are left as they are, and the gradient is dropped.
        """
        ...

    def losses(self, batch: Batch) -> Tensor:
        """Token losses (B, T) in fp32, 0 where unsupervised, without gradient."""
        ...

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token losses, and where a classifier is right: see :meth:`distft.model.LossModel.scores`."""
        ...

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums each value over all ranks in fp64; the result is the same on all of them."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        ...

    def gather_aside(self, value: Any) -> list[Any]:
        """As :meth:`gather`, for a thread beside training; it meets the other ranks' threads, one of each at a time."""
        ...

    def barrier(self) -> None:
        """Waits for all ranks."""
        ...

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """This rank's share of the trained weights and the optimizer's state, as it is now, not yet on disk.

        Before :meth:`Snapshot.hold` nobody may call :meth:`step` or :meth:`restore`.

        Args:
            into: One of before that nobody needs any more, for its memory.
        """
        ...

    def restore(self, state: StateReader) -> None:
        """Takes up a state that any number of ranks at any stage left; each rank reads only its own share.

        Raises:
            CheckpointError: On every rank, where one of them cannot read its share.
        """
        ...

    def state_bytes(self) -> int:
        """About how many bytes a checkpoint takes, over all ranks."""
        ...

    def peak_memory_bytes(self) -> int:
        """The most memory this rank has used: of the device, or of the process on a CPU."""
        ...

    def close(self) -> None:
        """Frees the model and the optimizer; the process group stays."""
        ...


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits trained parameters for AdamW: matrices decay; biases, magnitudes and the gains of norms (1-D) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # an adapter has matrices only, and DeepSpeed no empty groups


def row_losses(batch: Batch, rows: Tensor) -> Tensor:
    """What :meth:`Engine.forward_backward` returns, of a loss model's row losses."""
    return rows[:0] if batch.is_empty else rows

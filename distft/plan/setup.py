"""One way of running a job: what memory and time are functions of."""

from __future__ import annotations

import math
from dataclasses import dataclass

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setup:
    """How a job is trained.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        dtype: Of weights and activations: ``bf16`` or ``fp32``.
        stage: ZeRO stage.
        offload: ``none`` or ``cpu``: where the optimizer's state is.
        checkpointing: Whether activations are computed again in the backward pass.
        workers: Ranks N.
        nodes: Machines that they are on.
        batch_size: Rows of a step over all ranks.
        micro_batch_size: Rows B of a pass.
        row_tokens: Tokens T of a row.
        attended_tokens: The mean length of the segment that a token lies in.
        masked: Whether a mask keeps the segments of a row apart: of packed rows in fp32 on a GPU.
        quantised: Whether frozen matrices are in four bits (QLoRA).
        fill: The share of a row's tokens that is no padding.
        compiled: Whether layers are compiled.
        hpz: Ranks that hold a second copy of the weights between them, at stage 3 (ZeRO++'s hpZ); 1: none.
        sharing: Ranks S that share rows (DeepSpeed-Ulysses); 1: none.
    """

    device_type: str
    dtype: str
    stage: int
    offload: str
    checkpointing: bool
    workers: int
    nodes: int
    batch_size: int
    micro_batch_size: int
    row_tokens: int
    attended_tokens: int
    masked: bool
    quantised: bool = False
    fill: float = 1.0
    compiled: bool = False
    hpz: int = 1
    sharing: int = 1

    @property
    def bytes(self) -> int:
        """Of a number in the type of weights and activations."""
        return DTYPE_BYTES[self.dtype]

    @property
    def pass_tokens(self) -> int:
        """Tokens of one forward pass on a rank, B T / S."""
        return self.micro_batch_size * math.ceil(self.row_tokens / self.sharing)

    @property
    def passes(self) -> int:
        """Passes of a step that each rank makes: gradient accumulation."""
        return math.ceil(self._shares / self.workers)

    @property
    def last_workers(self) -> int:
        """Workers that have rows in the last pass of a step, the first ones."""
        return self._shares - (self.passes - 1) * self.workers

    @property
    def _shares(self) -> int:
        """Micro-batches of a step, each counted for all workers that share it."""
        return math.ceil(self.batch_size / self.micro_batch_size) * self.sharing

    @property
    def rank_tokens(self) -> float:
        """Tokens of a step on the rank that has most of them."""
        rows = min(self.passes * self.micro_batch_size, self.batch_size)
        return rows * self.row_tokens * self.fill / self.sharing

    @property
    def step_tokens(self) -> float:
        """Tokens of a step over all ranks."""
        return self.batch_size * self.row_tokens * self.fill

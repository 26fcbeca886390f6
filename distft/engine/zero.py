"""DeepSpeed ZeRO 0 to 3 over gloo or NCCL; beside it only :mod:`distft.engine.sequence` imports DeepSpeed.

DeepSpeed averages over ranks and divides by accumulation steps; neither is wanted where ranks hold unequal numbers of
micro-batches and supervised tokens (deepspeedai/DeepSpeed#1488, #966). So accumulation is 1 in its configuration, the
boundaries are set by hand, and the loss is multiplied by the number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from distft.engine import pieces, processes, shares
from distft.engine.clip import clip
from distft.engine.memory import peak_memory_bytes
from distft.engine.protocol import KINDS, Settings, StateReader, parameter_groups, row_losses
from distft.engine.sequence import SharedRows
from distft.engine.snapshot import Snapshot
from distft.errors import DistftError
from distft.model import Batch, LossModel
from distft.plan.memory import BUCKET
from distft.world import World

# DeepSpeed compiles a C++ all-reduce for inference at the first use of a process group on a CPU (30 s, and it needs a
# compiler and ninja). Training never calls it. This is the table that DeepSpeed looks it up in; an empty one skips both
# the build and the probing of compilers. Remove when DeepSpeed builds it on demand (0.19.8 does not).
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 calls old: one line per shard and step.
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")


class _Passes(nn.Module):
    """Both uses of the model behind one forward, since ZeRO-3 gathers weights in hooks on calls of the root module."""

    def __init__(self, loss_model: LossModel) -> None:
        super().__init__()
        self.loss_model = loss_model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and each row's part of it, (B,), in training; token losses and hits, both (B, T), in evaluation."""
        if self.training:
            losses: tuple[Tensor, Tensor] = self.loss_model(batch)
            return losses
        return self.loss_model.scores(batch)


class ZeroEngine:
    """DeepSpeed over the current process group.

    Args:
        model: The model, whole, on the CPU and equal on all ranks.
        settings: How to train it.
        world: This rank's place.
        device: Where to compute.
    """

    def __init__(self, model: LossModel, settings: Settings, world: World, device: torch.device) -> None:
        self.world = world
        self.device = device
        self._settings = settings
        self._aside = processes.aside()
        shares_rows = settings.sequence_parallel_size > 1
        self._shared = SharedRows(model, settings.sequence_parallel_size, world) if shares_rows else None
        self._trained = {  # shapes as well: ZeRO-3 leaves nothing of them on the parameters
            name: (parameter, tuple(parameter.shape))
            for name, parameter in model.model.named_parameters()
            if parameter.requires_grad
        }
        # Without ZeRO and in fp32 DeepSpeed keeps no norm: it is computed, and gradients clipped, here.
        self._own_norm = settings.stage == 0 and settings.dtype == torch.float32
        module = _Passes(model)
        with contextlib.redirect_stdout(io.StringIO()):  # some of its optimizers print as they are made
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=_optimizer(module, settings, device),
                config=_configuration(settings, device, own_norm=self._own_norm),
                dist_init_required=False,
            )
        if settings.stage == 0 and not self._own_norm:
            # In bf16 without ZeRO, DeepSpeed makes a step of zero gradients to allocate AdamW's state, which corrects
            # its bias for one step too many from then on (the loss was 0.7 % off after 20 steps). Remove when
            # FP16_UnfusedOptimizer.initialize_optimizer_states makes no step (0.19.8 does).
            self._engine.basic_optimizer.state.clear()
        if settings.stage > 0 and settings.dtype == torch.float32 and settings.offload == "none":
            shares.step_weights_in_place(self._engine.optimizer, settings, world)
            if settings.stage < 3:
                shares.sum_gradients_in_place(self._engine.optimizer)

    def forward_backward(self, batch: Batch, scale: float, *, last: bool, seed: int) -> Tensor:
        """See :class:`~distft.engine.protocol.Engine`."""
        torch.manual_seed(seed)
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        loss, rows = self._engine(self._part(batch))
        self._engine.backward(loss * (scale * self.world.size), scale_wrt_gas=False)
        return row_losses(batch, rows)

    def step(self, learning_rate: float) -> float:
        """See :class:`~distft.engine.protocol.Engine`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._own_norm:
            return self._step_with_own_norm()
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _step_with_own_norm(self) -> float:
        norm = clip(self._engine.module.parameters(), self._settings.max_grad_norm)
        if torch.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm.item()

    def losses(self, batch: Batch) -> Tensor:
        """See :class:`~distft.engine.protocol.Engine`."""
        return self.scores(batch)[0]

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`~distft.engine.protocol.Engine`."""
        self._engine.eval()
        losses, hits = self._engine(self._part(batch))
        if self._shared is None:
            return losses, hits
        tokens = batch.labels.shape[1]
        return self._shared.whole(losses, tokens), self._shared.whole(hits, tokens)

    def _part(self, batch: Batch) -> Batch:
        """What this rank passes of a batch."""
        return (batch if self._shared is None else self._shared.part(batch)).to(self.device)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.sum_over_ranks(values, self.device)

    def broadcast(self, value: Any) -> Any:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.broadcast(value, self.device)

    def gather(self, value: Any) -> list[Any]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.gather(value)

    def gather_aside(self, value: Any) -> list[Any]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.gather(value, self._aside)

    def barrier(self) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        dist.barrier()

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """See :class:`~distft.engine.protocol.Engine`."""
        held = self._holdings()
        if self._settings.stage == 0:
            held = [one.share(self.world.rank, self.world.size) for one in held]
        return pieces.snapshot(self._engine.basic_optimizer, held, into)

    def restore(self, state: StateReader) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        problem: DistftError | None = None
        try:
            pieces.restore(self._engine.basic_optimizer, self._holdings(), state)
        except DistftError as error:
            problem = error
        for raised in self.gather(problem):
            if raised is not None:
                raise raised
        shares.refresh(self._engine, self._settings)

    def _holdings(self) -> list[pieces.Holding]:
        return shares.holdings(self._engine, self._trained, self._settings, self.world)

    def state_bytes(self) -> int:
        """See :class:`~distft.engine.protocol.Engine`."""
        elements: int = sum(math.prod(shape) for _, shape in self._trained.values())
        return elements * len(KINDS) * 4  # fp32

    def peak_memory_bytes(self) -> int:
        """See :class:`~distft.engine.protocol.Engine`."""
        return peak_memory_bytes()

    def close(self) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        self._engine.destroy()
        dist.destroy_process_group(self._aside)
        if self._shared is not None:
            self._shared.close()
        if self._settings.hpz_partition_size > 1:
            # DeepSpeed keeps it for good, and the next engine of this process would take it for its own (0.19.8).
            dist.destroy_process_group(groups._ZERO_PARAM_INTRA_PARALLEL_GROUP)
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        del self._engine, self._trained


def _optimizer(module: nn.Module, settings: Settings, device: torch.device) -> torch.optim.Optimizer:
    groups = parameter_groups(module, settings.weight_decay)
    if settings.offload == "cpu" and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles C++ at first use

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=0.0, adamw_mode=True)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def _configuration(settings: Settings, device: torch.device, *, own_norm: bool) -> dict[str, Any]:
    """DeepSpeed's configuration (https://www.deepspeed.ai/docs/config-json/)."""
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "overlap_comm": device.type == "cuda" and settings.stage > 0,  # needs streams
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET[device.type],
        # At ZeRO 1 and 2 whole buckets are summed either way; to scatter them too copies each twice more (6 % of a
        # step of SmolLM2-135M on a CPU).
        "reduce_scatter": device.type == "cuda" or settings.stage == 3,
    }
    if settings.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    if settings.stage == 3:
        zero["zero_hpz_partition_size"] = settings.hpz_partition_size
    return {
        "data_types": {"grad_accum_dtype": "fp32" if settings.stage > 0 else None},
        "communication_data_type": "fp32",
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if own_norm else settings.max_grad_norm or 0.0,
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": device.type == "cuda",
        "steps_per_print": None,
    }

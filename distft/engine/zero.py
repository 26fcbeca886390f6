"""DeepSpeed ZeRO 0 to 3 over gloo or NCCL: the only file that imports DeepSpeed.

DeepSpeed averages over ranks and divides by accumulation steps; neither is wanted where ranks hold unequal numbers of
micro-batches and supervised tokens (deepspeedai/DeepSpeed#1488, #966). So accumulation is 1 in its configuration, the
boundaries are set by hand, and the loss is multiplied by the number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from distft.engine import processes
from distft.engine.memory import peak_memory_bytes
from distft.engine.protocol import Settings, parameter_groups
from distft.model import Batch, LossModel
from distft.world import World

#: DeepSpeed's name for the folder inside a checkpoint that holds the shards.
TAG = "zero"
MODEL_FILE = "mp_rank_00_model_states.pt"

# DeepSpeed compiles a C++ all-reduce for inference at the first use of a process group on a CPU (30 s, and it needs a
# compiler and ninja). Training never calls it. This is the table that DeepSpeed looks it up in; an empty one skips both
# the build and the probing of compilers. Remove when DeepSpeed builds it on demand (0.19.8 does not).
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 calls old: one line per shard and step.
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")


class _Passes(nn.Module):
    """Both uses of the model behind one forward, since ZeRO-3 gathers weights in hooks on calls of the root module.

    Its state is what is trained: frozen weights are the base model's, and a checkpoint need not hold them again.
    DeepSpeed has an option for that too, which leaves a tied weight in under its second name; it is given as well,
    for the shards that DeepSpeed writes of its own.
    """

    def __init__(self, loss_model: LossModel) -> None:
        super().__init__()
        self.loss_model = loss_model

    def forward(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """The loss sum in training; token losses and hits, both (B, T), in evaluation."""
        if self.training:
            loss: Tensor = self.loss_model(batch)
            return loss
        return self.loss_model.scores(batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained weights and buffers."""
        frozen = {name for name, one in self.named_parameters(remove_duplicate=False) if not one.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name not in frozen}


class _ShardWriter(TorchCheckpointEngine):  # type: ignore[misc]
    """Writes DeepSpeed's files, and remembers which they were and what went wrong.

    An error must not leave DeepSpeed's save half-way: its barriers would hold the other ranks until they time out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: list[Path] = []
        self.error: OSError | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.error is not None:
            return
        try:
            torch.save(state_dict, path)
            self.files.append(Path(path))
        except OSError as error:
            self.error = error
        except RuntimeError as error:  # torch's own writer: "... file write failed" where the disk is full
            self.error = OSError(28, str(error))


class ZeroEngine:
    """DeepSpeed over the current process group.

    Args:
        model: The model, whole, on the CPU and equal on all ranks.
        settings: Stage, offload, type, decay and clipping.
        world: This rank's place.
        device: Where to compute.
    """

    def __init__(self, model: LossModel, settings: Settings, world: World, device: torch.device) -> None:
        self.world = world
        self.device = device
        self._settings = settings
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._whole = len(trained) == len(list(model.parameters()))
        self._parameters = sum(parameter.numel() for parameter in trained)
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
        self._engine.checkpoint_engine = self._writer = _ShardWriter()

    def forward_backward(self, batch: Batch, scale: float, *, last: bool, seed: int) -> float:
        """See :class:`~distft.engine.protocol.Engine`."""
        torch.manual_seed(seed)
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self._engine(batch.to(self.device))
        self._engine.backward(loss * (scale * self.world.size), scale_wrt_gas=False)
        return loss.item()

    def step(self, learning_rate: float) -> float:
        """See :class:`~distft.engine.protocol.Engine`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._own_norm:
            return self._step_with_own_norm()
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _step_with_own_norm(self) -> float:
        limit = self._settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), float("inf") if limit is None else limit)
        if torch.isfinite(norm):
            self._engine.step()
        return norm.item()

    def losses(self, batch: Batch) -> Tensor:
        """See :class:`~distft.engine.protocol.Engine`."""
        return self.scores(batch)[0]

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`~distft.engine.protocol.Engine`."""
        self._engine.eval()
        scores: tuple[Tensor, Tensor] = self._engine(batch.to(self.device))
        return scores

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.sum_over_ranks(values, self.device)

    def broadcast(self, value: Any) -> Any:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.broadcast(value, self.device)

    def gather(self, value: Any) -> list[Any]:
        """See :class:`~distft.engine.protocol.Engine`."""
        return processes.gather(value)

    def barrier(self) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        dist.barrier()

    def save(self, folder: Path) -> list[Path]:
        """See :class:`~distft.engine.protocol.Engine`."""
        self._writer.files, self._writer.error = [], None
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        if self.world.is_main:
            for script in folder.glob("zero_to_*.py"):  # which DeepSpeed leaves beside its shards
                script.unlink()
        if self._writer.error is not None:
            raise self._writer.error
        return self._writer.files

    def load(self, folder: Path) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        with contextlib.redirect_stdout(io.StringIO()):  # some of its optimizers print as they are loaded
            self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=self._whole)

    def state_bytes(self) -> int:
        """See :class:`~distft.engine.protocol.Engine`."""
        return self._parameters * (self._settings.dtype.itemsize + 3 * 4)

    def peak_memory_bytes(self) -> int:
        """See :class:`~distft.engine.protocol.Engine`."""
        return peak_memory_bytes()

    def close(self) -> None:
        """See :class:`~distft.engine.protocol.Engine`."""
        self._engine.destroy()
        del self._engine


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
    }
    if settings.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
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


def consolidate(folder: Path) -> dict[str, Tensor]:
    """See :func:`distft.engine.consolidate`."""
    shards = folder / TAG
    files = sorted(shards.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not files:
        state = _load(shards / MODEL_FILE)["module"]
    elif "zero_stage" not in (first := _load(files[0])["optimizer_state_dict"]):
        state = _stage_1_bf16(
            _load(shards / MODEL_FILE), [first, *(_load(f)["optimizer_state_dict"] for f in files[1:])]
        )
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints progress
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    prefix = "loss_model.model."
    return {name.removeprefix(prefix): weight.float() for name, weight in state.items()}


def _stage_1_bf16(model: dict[str, Any], optimizers: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The fp32 weights of DeepSpeed's BF16_Optimizer, of which its own zero_to_fp32 knows nothing.

    Each rank holds a slice of each group's weights, laid end to end and padded at the end.
    """
    state = {name: model["module"][name] for name in model["buffer_names"]}
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([optimizer["single_partition_of_fp32_groups"][group] for optimizer in optimizers])
        sizes = [shape.numel() for shape in shapes.values()]
        parts = torch.split(flat[: sum(sizes)], sizes)
        state |= {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    shared = model["shared_params"].items()
    return state | {name: state[original] for name, original in shared if original in state}


def _load(path: Path) -> Any:
    """Reads a shard. It is a pickle and runs code: only files that a run's COMPLETE vouches for are read."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _rank_of(path: Path) -> int:
    return int(path.name.split("zero_pp_rank_")[1].split("_")[0])

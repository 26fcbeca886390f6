"""What the peers' scripts share: their arguments, DeepSpeed's settings, the clock and the line that they print.

It imports nothing of distft: each script runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback


def parser() -> argparse.ArgumentParser:
    """Of the arguments that all of them take."""
    made = argparse.ArgumentParser()
    made.add_argument("--model", required=True)
    made.add_argument("--rows", required=True, help="a .npz file, see tensors and texts; taken in order")
    made.add_argument("--steps", type=int, required=True)
    made.add_argument("--batch-size", type=int, required=True, help="rows of a step, over all ranks")
    made.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    made.add_argument("--zero", type=json.loads, default={}, help="settings of DeepSpeed's ZeRO besides, as JSON")
    made.add_argument("--out", default="out", help="a folder for what a peer writes")
    return made


def tensors(path: str) -> list[dict[str, torch.Tensor]]:
    """Rows as models take them: ``input_ids``, ``position_ids`` and ``labels``, each (T,)."""
    file = np.load(path)
    columns = {name: torch.from_numpy(file[name]) for name in ("input_ids", "position_ids", "labels")}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(file["tokens"]))]


def texts(path: str) -> list[list[int]]:
    """The texts of the rows, as token ids."""
    file = np.load(path)
    found = []
    for ids, positions, tokens in zip(file["input_ids"], file["position_ids"], file["tokens"], strict=True):
        begins = np.flatnonzero(positions[:tokens] == 0)
        found += [part.tolist() for part in np.split(ids[:tokens], begins[1:])]
    return found


def deepspeed_settings(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """The same for all: ZeRO-2, one row a pass."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": arguments.batch_size // ranks,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "zero_optimization": {"stage": 2, "overlap_comm": False, **arguments.zero},
        "zero_allow_untested_optimizer": True,
    }


def trainer_settings(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """What transformers' Trainer and those made of it are told."""
    return {
        "output_dir": arguments.out,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": arguments.batch_size // ranks,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "bf16": arguments.dtype == "bf16",
        "use_cpu": True,
        "ddp_backend": "gloo",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "deepspeed": deepspeed_settings(arguments, ranks),
    }


class Clock(TrainerCallback):
    """Seconds of each optimizer step of a Trainer, from its first micro-batch to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def tell(seconds: list[float], losses: list[float], **more: Any) -> dict[str, Any]:
    """The figures of all ranks, printed on rank 0 as a line of JSON; losses are the mean over ranks."""
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, losses
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, mine)
    means = [sum(step) / len(each) for step in zip(*(told for _, told in each), strict=True)]
    found = {"step_seconds": seconds, "losses": means, "peak_memory_bytes": max(peak for peak, _ in each), **more}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    return found

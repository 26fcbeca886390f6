"""Ray's way of fine-tuning with DeepSpeed, on the same rows: two workers of a Ray cluster that it starts for itself.

It does what the example in Ray's documentation does ("Fine-tune an LLM with Ray Train and DeepSpeed", Ray 2.60,
doc/source/train/examples/pytorch/deepspeed_finetune): torch's AdamW as it is, gradients summed in the type of the
weights, padding masked in attention and supervised like text, a report to Ray at the end. It differs in what all peers
share: ZeRO-2 for its ZeRO-3, accumulation, gloo, rows in order, and rows that are full: left to itself it pads each
document to a row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import ray.train
import ray.train.torch
import torch
from measuring import deepspeed_settings, parser, tell, tensors
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

RANKS = 2


def train(settings: dict[str, Any]) -> None:
    """One worker."""
    arguments = argparse.Namespace(**settings)
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0),
        config={
            **deepspeed_settings(arguments, RANKS),
            "grad_accum_dtype": arguments.dtype,
            "steps_per_print": 10**9,
        },
    )
    rows = [row["input_ids"] for row in tensors(arguments.rows)]
    given = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    loader = iter(ray.train.torch.prepare_data_loader(DataLoader(given, batch_size=1)))
    engine.train()
    seconds, losses = [], []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        total = 0.0
        for _ in range(arguments.batch_size // RANKS):
            batch = next(loader)
            ids = batch["input_ids"]
            loss = engine(input_ids=ids, attention_mask=batch["attention_mask"], labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.item()
        seconds.append(time.perf_counter() - start)
        losses.append(total / (arguments.batch_size // RANKS))
    found = tell(seconds, losses)
    if ray.train.get_context().get_world_rank() == 0:
        Path(arguments.out).write_text(json.dumps(found), encoding="utf-8")
    ray.train.report({"loss": losses[-1]})


def main() -> None:
    arguments = parser().parse_args()
    # Workers find measuring.py, and ninja, which compiles a part of DeepSpeed at its first use.
    paths = {"PYTHONPATH": str(Path(__file__).parent), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ray.init(address="local", num_cpus=RANKS, include_dashboard=False, runtime_env={"env_vars": {**paths, **threads}})
    with tempfile.TemporaryDirectory() as storage:
        arguments.out = str(Path(storage) / "found.json")  # without a checkpoint Ray hands no metrics back
        TorchTrainer(
            train,
            train_loop_config=vars(arguments),
            scaling_config=ScalingConfig(num_workers=RANKS),
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=storage, name="peer"),
        ).fit()
        print(Path(arguments.out).read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()

"""TRL's SFTTrainer with packing and DeepSpeed on the same rows. Run under torchrun in an environment of its own.

It prints one JSON line on rank 0, as bare_deepspeed.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from its first micro-batch to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    accumulation = arguments.batch_size // size
    rows = np.load(arguments.rows)
    bf16 = arguments.dtype == "bf16"
    clock = Clock()
    trainer = SFTTrainer(
        model=arguments.model,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            max_length=rows.shape[1],
            packing=True,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=False,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=bf16,
            use_cpu=True,
            ddp_backend="gloo",
            model_init_kwargs={"dtype": "bfloat16" if bf16 else "float32"},
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            deepspeed={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": 1.0,
                "bf16": {"enabled": bf16},
                "zero_optimization": {"stage": 2, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
            },
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = [0] * size
    dist.all_gather_object(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if dist.get_rank() == 0:
        print(json.dumps({"step_seconds": clock.seconds, "losses": losses, "peak_memory_bytes": max(peak)}))


if __name__ == "__main__":
    main()

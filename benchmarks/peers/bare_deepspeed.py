"""The loop that one would write by hand: transformers' own loss, DeepSpeed's own accumulation. Run under torchrun.

It trains on the rows of a .npz file and prints one JSON line on rank 0.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from measuring import deepspeed_settings, parser, tell, tensors
from transformers import AutoModelForCausalLM


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, size = dist.get_rank(), dist.get_world_size()
    accumulation = arguments.batch_size // size
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True),
        config={**deepspeed_settings(arguments, size), "steps_per_print": 10**9},
    )
    rows = tensors(arguments.rows)
    seconds, losses = [], []
    for step in range(arguments.steps):
        start = time.perf_counter()
        total = 0.0
        for number in range(accumulation):
            row = rows[(step * arguments.batch_size + number * size + rank) % len(rows)]
            loss = engine(**{name: value[None] for name, value in row.items()}, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.item()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        losses.append(total / accumulation)
    tell(seconds, losses)


if __name__ == "__main__":
    main()

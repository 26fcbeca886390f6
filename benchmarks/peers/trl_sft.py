"""TRL's SFTTrainer with DeepSpeed on the same texts, packed by it. Run under torchrun in an environment of its own."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from datasets import Dataset
from measuring import Clock, parser, tell, texts, trainer_settings
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    length = np.load(arguments.rows)["input_ids"].shape[1]
    clock = Clock()
    trainer = SFTTrainer(
        model=arguments.model,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        train_dataset=Dataset.from_dict({"input_ids": texts(arguments.rows)}),
        callbacks=[clock],
        args=SFTConfig(
            max_length=length,
            packing=True,
            model_init_kwargs={"dtype": "bfloat16" if arguments.dtype == "bf16" else "float32"},
            **trainer_settings(arguments, int(os.environ["WORLD_SIZE"])),
        ),
    )
    trainer.train()
    packed = [sum(lengths) - len(lengths) for lengths in trainer.train_dataset["seq_lengths"]]  # a text's first is none
    supervised = [
        sum(packed[row % len(packed)] for row in range(step * arguments.batch_size, (step + 1) * arguments.batch_size))
        for step in range(arguments.steps)
    ]
    tell(
        clock.seconds,
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        supervised_tokens=supervised,
    )


if __name__ == "__main__":
    main()

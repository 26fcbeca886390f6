"""TRL's SFTTrainer with packing and DeepSpeed on the same rows. Run under torchrun in an environment of its own."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from datasets import Dataset
from measuring import Clock, parser, tell, trainer_settings
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    rows = np.load(arguments.rows)
    clock = Clock()
    trainer = SFTTrainer(
        model=arguments.model,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        callbacks=[clock],
        args=SFTConfig(
            max_length=rows.shape[1],
            packing=True,
            model_init_kwargs={"dtype": "bfloat16" if arguments.dtype == "bf16" else "float32"},
            **trainer_settings(arguments, int(os.environ["WORLD_SIZE"])),
        ),
    )
    trainer.train()
    tell(clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    main()

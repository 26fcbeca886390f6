"""The job file: what loads, with which defaults, and what every mistake in it is told."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import Every, InvalidJob, Job, Steps
from distft.config.keys import fields, models
from distft.errors import JobError

SMALLEST = """\
model: {source: gpt2}
task: {kind: language_modeling}
data: {source: data/*.txt}
"""

CONTRACT = """\
name: century                       # run name; default: file name
seed: 17
model:
  source: HuggingFaceTB/SmolLM2-135M-Instruct
  sha256: null
  revision: null
  dtype: auto
  adapter: null
  trust_remote_code: false
task:
  kind: language_modeling
  preset: null
  prompt: null
  response: null
  messages: null
  text: text
  label: label
data:
  source: data/*.jsonl
  lines: false
  splits: {validation: 0.05, test: 0.05, group_by: null, stratify_by: null}
  max_tokens: 1024
  overlong: error
  packing: true
  limit: null
train:
  epochs: 1
  learning_rate: 2.0e-5
  schedule: {kind: cosine, warmup: 0.03}
  batch_size: 32
  micro_batch_size: auto
  weight_decay: 0.0
  max_grad_norm: 1.0
  validate_every: 0.25
  patience: null
  activation_checkpointing: auto
zero: {stage: auto, offload: none}
cluster:
  address: auto
  workers: 2
  resources_per_worker: {CPU: 1}
  max_failures: 3
checkpoint: {every: {steps: 100}, budget: 20GB, storage: null}
search: null
evaluate: {metrics: default, samples: 1000, compare_base: true}
serve: {engine: auto, replicas: {min: 1, max: 1}, max_new_tokens: 512}
track: {tensorboard: true, mlflow: null, wandb: null}
"""


@pytest.fixture
def job_file(tmp_path: Path):
    def write(text: str | bytes, name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def lines(path: Path, *overrides: str) -> list[str]:
    """What Job.load complains of, a line each, without the folder."""
    with pytest.raises(InvalidJob) as caught:
        Job.load(path, overrides)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_the_contracts_example_loads_and_its_values_are_the_defaults(job_file):
    full, smallest = Job.load(job_file(CONTRACT)), Job.load(job_file(SMALLEST))
    assert full.name == "century"
    assert full.cluster.workers == 2
    expected = full.dump()
    expected["name"], expected["cluster"]["workers"] = "job", 1
    expected["model"]["source"], expected["data"]["source"] = "gpt2", "data/*.txt"
    assert smallest.dump() == expected


def test_numbers_are_those_of_yaml_1_2(job_file):
    text = SMALLEST + "train: {learning_rate: 2e-5, weight_decay: .5, batch_size: 0x10, epochs: 3}\nseed: 007\n"
    job = Job.load(job_file(text))
    assert (job.train.learning_rate, job.train.weight_decay, job.train.batch_size) == (2e-5, 0.5, 16)
    assert job.train.epochs == 3
    assert isinstance(job.train.epochs, float)
    assert job.seed == 7


def test_five_mistakes_get_five_messages_with_their_lines(job_file):
    path = job_file(
        """\
name: century
model:
  source: gpt2
  dtype: fp23
task: {kind: language_modeling}
data:
  source: data/*.txt
  splits: {validation: 0.5, test: 0.5}
  max_tokens: many
train:
  learning_rat: 2e-5
  batch_size: 0
"""
    )
    assert lines(path) == [
        "job.yaml:4  model.dtype: must be auto, bf16, fp32 or fp16, not 'fp23'; did you mean fp32?",
        "job.yaml:8  data.splits: validation 0.5 and test 0.5 leave nothing to train on; together they must be below 1",
        "job.yaml:9  data.max_tokens: must be a whole number, not 'many'; meaning: length of a row, in tokens",
        "job.yaml:11  train.learning_rat: unknown key; did you mean learning_rate?",
        "job.yaml:12  train.batch_size: must be at least 1, not 0; "
        "meaning: rows per optimizer step over the whole cluster, whatever its size (global batch)",
    ]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("learning_rate: 1e-5", "learning_rate: unknown key; it belongs elsewhere: train.learning_rate"),
        ("lr: 1e-5", "lr: unknown key; here that is train.learning_rate"),
        ("Seed: 5", "Seed: unknown key; did you mean seed?"),
        ("source: x", "source: unknown key; it belongs elsewhere: model.source or data.source"),
        ("trian: {epochs: 2}", "trian: unknown key; did you mean train?"),
        ("max_tokns: 2", "max_tokns: unknown key; did you mean data.max_tokens?"),
        ("train: {batch-size: 2}", "train.batch-size: unknown key; did you mean batch_size?"),
        ("train: {warmup: 0.1}", "train.warmup: unknown key; it belongs elsewhere: train.schedule.warmup"),
        ("zero: {zzz: 2}", "zero.zzz: unknown key; keys here: stage, offload, hpz_partition_size"),
        ("zero: 2", "zero: must be a mapping with stage, offload, hpz_partition_size, not 2; did you mean"),
        ("zero: {stage: 4}", "zero.stage: must be at most 3 or auto, not 4; meaning: sharded: 0 nothing"),
        ("zero: {stage: true}", "zero.stage: must be a whole number or auto, not true; meaning: sharded"),
        ("zero: {offload: null}", "zero.offload: must be none, cpu, nvme or auto, not null; did you mean none?"),
        ("seed: 12x", "seed: must be a whole number, not '12x'; meaning: fixes splits"),
        ("seed: '3'", "seed: must be a whole number, not '3'; write it without quotation marks"),
        ("seed: true", "seed: must be a whole number, not true; meaning: fixes splits"),
        ("seed: 1e2", "seed: must be a whole number, not 1e2; write 100"),
        ("name: 2024", "name: must be text, not 2024; put it in quotation marks: \"2024\""),
        ("name: a/b", "name: must be a folder's name: letters, digits"),
        ("train: {epochs: .inf}", "train.epochs: must be a finite number, not .inf; meaning"),
        ("train: {validate_every: 100}", "or {steps: N}, not 100; for every 100 steps write {steps: 100}"),
        ("train: {validate_every: {stps: 3}}", "train.validate_every.stps: unknown key; did you mean steps?"),
        ("train: {validate_every: often}", "must be a number or a mapping with steps, not 'often'; meaning: from one"),
        ("train: {packing: yes}", "train.packing: unknown key; it belongs elsewhere: data.packing"),
        ("train: {gradient_accumulation_steps: 4}", "unknown key; accumulation follows from train.batch_size"),
        ("zero: {zero_quantized_weights: true}", "unknown key; not here: ZeRO++ rounds what it sends to few bits"),
        ("zero: {hpz: {size: 2}}", "zero.hpz: unknown key; here that is zero.hpz_partition_size"),
        ("zero: {zero_hpz_partition_size: 2}", "unknown key; here that is zero.hpz_partition_size"),
        ("zero: {hpz_partition_size: 0}", "zero.hpz_partition_size: must be at least 1 or auto, not 0; meaning"),
        ("zero: {qgz: {bits: 4}}", "zero.qgz: unknown key; not here: ZeRO++ rounds what it sends to few bits"),
        ("train: {sequence_parallel_size: 0}", "train.sequence_parallel_size: must be at least 1, not 0; meaning"),
        ("cluster: {ulysses: 2}", "cluster.ulysses: unknown key; here that is train.sequence_parallel_size"),
        ("train: {context_parallel_size: 2}", "unknown key; not built yet: ring attention; train"),
        ("cluster: {workers: {min: 1, mox: 2}}", "cluster.workers.mox: unknown key; did you mean max?"),
        ("cluster: {workers: 0}", "cluster.workers: must be at least 1 or a mapping with min, max, not 0; meaning"),
        ("cluster: {resources_per_worker: {GPU: -1}}", "cluster.resources_per_worker.GPU: must be at least 0, not -1"),
        ("checkpoint: {budget: 20}", "checkpoint.budget: must be a size such as 20GB, 1.5TB or 500MiB, not 20"),
        ("track: {tensorboard: yes}", "track.tensorboard: must be true or false, not 'yes'; write true"),
        ("evaluate: {metrics: [loss, los]}", "calibration_error, not 'los'; did you mean loss?"),
        ("evaluate: {metrics: []}", "evaluate.metrics: must be a list of at least 1, not []"),
        ("train: {learning_rate: null}", "must be a number, not null; remove the line for the default"),
        ("seed: !int64 5", "seed: the tag !int64 means nothing in a job file; remove it"),
        ("seed: 3\nseed: 4", "seed: written twice, first on line 4; keep one of them"),
        ("? [a]\n: 3", "a key must be a word; is a bracket open, or quotes missing?"),
        ("track: &t {tensorboard: *t}", "track.tensorboard: the value contains itself"),
    ],
)  # fmt: skip
def test_one_mistake_gets_one_message(job_file, written: str, message: str):
    (line,) = lines(job_file(SMALLEST + written + "\n"))
    assert line.startswith(f"job.yaml:{5 if chr(10) + 'seed' in written else 4}  ")
    assert message in line


@pytest.mark.parametrize(
    ("text", "start", "part"),
    [
        ("", "job.yaml  ", "the file is empty; a job file names at least"),
        ("# only a comment\n", "job.yaml  ", "the file is empty"),
        ("- model\n- task\n", "job.yaml:1  ", "does not consist of `key: value` lines"),
        ("model:\n\tsource: gpt2\n", "job.yaml:2  ", "a tab is used for indentation; YAML wants spaces"),
        ("model:\n  source: gpt2\n dtype: auto\n", "job.yaml:3  ", "the indentation fits no line above"),
        ("name: a: b\n", "job.yaml:1  ", "a second `:` stands where a value is expected"),
        ("model: {source: gpt2\ntask: x\n", "job.yaml:1  ", "a bracket is not closed"),
        ("name: 'x\n", "job.yaml:1  ", "a quotation mark is not closed"),
        ("name: a\n---\nname: b\n", "job.yaml:2  ", "several documents"),
        ("name: *x\n", "job.yaml:1  ", "refers to a value that is named nowhere"),
        ("name: @x\n", "job.yaml:1  ", "cannot begin a value; put the value in quotes"),
        ("name: \x00\n", "job.yaml  ", "not YAML: unacceptable character"),
        ("[" * 600, "job.yaml  ", "nested too deeply"),
        (b"seed: 1\nname: caf\xe9\n", "job.yaml:2  ", "not UTF-8: byte 0xe9; save it in UTF-8"),
        (b"#" * (1 << 21), "job.yaml  ", "2,097,152 bytes, which no job file has"),
    ],
)
def test_a_file_that_is_no_job_file(job_file, text: str | bytes, start: str, part: str):
    (line,) = lines(job_file(text))
    assert line.startswith(start)
    assert part in line


def test_a_missing_file_names_those_that_are_near(job_file):
    path = job_file(SMALLEST, "quickstart.yaml")
    assert lines(path.with_name("quickstrat.yaml")) == [
        "quickstrat.yaml  there is no such file; in that folder: quickstart.yaml"
    ]
    assert "cannot be read" in lines(path.parent)[0]


def test_required_keys(job_file):
    assert [line.split(";")[0] for line in lines(job_file("seed: 3\ndata:\n  lines: true\n"))] == [
        "job.yaml:2  data.source: missing, and required",
        "job.yaml  model.source: missing, and required",
        "job.yaml  task.kind: missing, and required",
    ]


def test_a_misspelt_required_key_is_one_mistake(job_file):
    text = "modle: {source: gpt2}\ntask: {knd: generation}\ndata: {source: x.txt}\n"
    assert lines(job_file(text)) == [
        "job.yaml:1  modle: unknown key; did you mean model?",
        "job.yaml:2  task.knd: unknown key; did you mean kind?",
    ]


def test_a_hash_read_as_a_number_is_told_about_quotes(job_file):
    digits = "0123456789" * 6 + "0123"
    (line,) = lines(job_file(f"model: {{source: m.gguf, sha256: {digits}}}\n" + SMALLEST.partition("\n")[2]))
    assert line == (f'job.yaml:1  model.sha256: must be text, not {digits}; put it in quotation marks: "{digits}"')
    (line,) = lines(job_file(SMALLEST), "model.source=m.gguf", "model.sha256=abc")
    assert "must be 64 hexadecimal digits, not 'abc'; it has 3 characters" in line


def test_a_byte_order_mark_and_dos_line_ends_do_no_harm(job_file):
    text = "\ufeff" + SMALLEST.replace("\n", "\r\n") + "seed: x\r\n"
    assert lines(job_file(text))[0].startswith("job.yaml:4  seed: ")


def test_the_name_comes_from_the_file(job_file):
    assert Job.load(job_file(SMALLEST, "state of the union.yaml")).name == "state-of-the-union"
    assert Job.load(job_file(SMALLEST, ".x.yaml")).name == "x"
    assert Job.load(job_file(SMALLEST), ["name=century"]).name == "century"


def test_folder_place_and_text(job_file):
    path = job_file(SMALLEST)
    job = Job.load(path, ["seed=3"])
    assert job.folder == path.parent.resolve()
    assert job.text == SMALLEST
    assert job.where("data.source") == f"{path}:3"
    assert job.where("train.steps") == str(path)
    assert job.where("seed") == "--set seed=3"
    assert Job.load(Job.load(job_file(job.text)).folder / "job.yaml").dump() == Job.load(path).dump()


def test_a_job_is_frozen_and_crosses_processes_whole(job_file):
    job = Job.load(job_file(SMALLEST), ["train.validate_every.steps=7", "cluster.resources_per_worker.GPU=1"])
    copied = pickle.loads(pickle.dumps(job))
    assert copied == job
    assert (copied.folder, copied.text, copied.where("seed")) == (job.folder, job.text, job.where("seed"))
    with pytest.raises(Exception, match="frozen"):
        job.train.batch_size = 3


def test_the_error_crosses_processes_whole(job_file):
    with pytest.raises(JobError) as caught:
        Job.load(job_file(SMALLEST + "lr: 3\nseed: x\n"))
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is InvalidJob
    assert copied.problems == caught.value.problems
    assert str(copied) == str(caught.value)
    assert str(copied).startswith("2 problems\n")
    assert copied.exit_status == 2
    first = copied.problems[0]
    assert (first.line, first.key, first.value, first.message) == (4, "lr", 3, "unknown key")
    assert first.fix == "here that is train.learning_rate"


def test_dump_holds_every_default_and_loads_again(job_file):
    job = Job.load(job_file(SMALLEST), ["train.steps=30", "checkpoint.every=0.5", "data.source=[a.txt, b.txt]"])
    dump = job.dump()
    assert dump["train"]["epochs"] is None
    assert dump["checkpoint"]["every"] == 0.5
    assert json.loads(json.dumps(dump)) == dump
    again = Job.from_values(dump, job.folder)
    assert again.dump() == dump
    assert again.folder == job.folder
    assert Job.from_values(json.loads(again.text), job.folder).dump() == dump


def test_every_key_says_what_it_is_for():
    undocumented = [key for key, info in fields(Job).items() if not info.description]
    assert not undocumented
    assert "Peak learning rate" in (fields(Job)["train.learning_rate"].description or "")


def test_every_section_is_strict_and_frozen():
    sections = {Job} | {section for info in fields(Job).values() for section in models(info.annotation)}
    assert len(sections) > 15
    for section in sections:
        assert section.model_config["frozen"], section
        assert section.model_config["strict"], section
        assert section.model_config.get("extra", "forbid") == "forbid", section


def test_loading_a_job_imports_nothing_heavy(job_file):
    code = (
        "import sys; from distft.config import Job, check; check(Job.load(sys.argv[1]));"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'pyarrow', 'numpy'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(job_file(SMALLEST))], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Every key there is with any value: a Job or an InvalidJob, never another exception.
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("auto"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["steps", "min", "max", "train", "choice", "GPU", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(fields(Job))), junk, min_size=1, max_size=5))
def test_any_values_give_a_job_or_a_list_of_problems(changes: dict[str, object]):
    values: dict[str, object] = {
        "model": {"source": "gpt2"}, "task": {"kind": "language_modeling"}, "data": {"source": "a.txt"}
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]  # type: ignore[assignment]
        section[last] = value
    try:
        job = Job.from_values(values, ".")
    except InvalidJob as error:
        problems = error.problems
    else:
        problems = ()
        assert Job.from_values(job.dump(), ".").dump() == job.dump()
    assert all(problem.message and problem.where == "job" for problem in problems)


@given(text=st.text(max_size=60))
def test_any_text_gives_a_job_or_a_list_of_problems(tmp_path_factory, text: str):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="ignore", newline="")
    with pytest.raises(InvalidJob):
        Job.load(path)


@given(fraction=st.floats(min_value=1e-6, max_value=1), total=st.integers(1, 10**7))
def test_every_is_at_least_one_step_and_at_most_the_run(fraction: float, total: int):
    every = Every.model_validate(fraction).steps(total)
    assert 1 <= every <= total
    assert abs(every - fraction * total) <= 1
    assert Every(Steps(steps=7)).steps(total) == 7


def test_keys_of_a_list_s_entries_and_of_peers_are_understood(job_file):
    (line,) = lines(
        job_file("""\
model: {source: gpt2}
task: {kind: language_modeling}
data: {source: [{source: a.jsonl, weigt: 2}]}
""")
    )
    assert line.endswith("data.source.0.weigt: unknown key; did you mean weight?")
    (line,) = lines(
        job_file("""\
model: {source: gpt2, adapter: {kind: lora, lora_r: 8}}
task: {kind: language_modeling}
data: {source: a.txt}
""")
    )
    assert line.endswith("model.adapter.lora_r: unknown key; here that is model.adapter.rank")

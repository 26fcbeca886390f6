"""A slow link between hosts (``host.sh``) is measured, and the planner knows what it makes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distft.runs import Run, decision, read_json, training_curve
from distft.train.forecast import measure
from tests.distributed import tiny
from tests.integration.test_hosts import HEAD, Hosts, home_on
from tests.integration.test_hosts import pytestmark as marks

pytestmark = marks

#: 100 Mbit/s, in bytes.
LINK = 12.5e6
JOB = """\
model: {source: ./model, dtype: fp32}
task: {kind: language_modeling}
data: {source: ./corpus.jsonl, max_tokens: 64, overlong: split, splits: {validation: 0.1, test: 0.1}}
train: {steps: 15, batch_size: 2, micro_batch_size: 1, learning_rate: 1e-3, validate_every: {steps: 15}}
checkpoint: {every: {steps: 1000}}
cluster: {workers: 2}
evaluate: {samples: 4}
track: {tensorboard: false}
"""


def slow_down(hosts: Hosts, number: int) -> str:
    """100 Mbit/s and 20 ms there and back, where the kernel can delay packets; else 100 Mbit/s. What was done."""
    delayed = ["netem", "rate", "100mbit", "delay", "10ms", "limit", "5000"]
    limited = ["tbf", "rate", "100mbit", "burst", "128kb", "latency", "100ms"]
    add = ["run", str(number), "tc", "qdisc", "add", "dev", "eth0", "root"]
    try:
        hosts.script(*add, *delayed)
    except AssertionError:
        hosts.script(*add, *limited)
        return "100 Mbit/s (this kernel delays nothing: no netem)"
    return "100 Mbit/s, 20 ms"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.boot(0, 1, 2)
        print([slow_down(made, number) for number in (1, 2)][-1])
        yield made
    finally:
        made.script("clean")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gradients take far longer over that link than its arithmetic: 3.3 M parameters, 13 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("files")
    tiny.make(folder)
    size = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = LlamaConfig.from_pretrained(folder / "model", **size, num_key_value_heads=6, head_dim=64)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(JOB)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_over_a_slow_link_takes_what_was_predicted(hosts: Hosts, files: Path, stage: int) -> None:
    home = home_on(hosts, HEAD, files)
    name = f"stage-{stage}"
    home.distft("train", "tiny.yaml", "--name", name, "--set", f"zero.stage={stage}", timeout=600)
    run = Run(files / "runs" / name)
    links = read_json(run.environment)["network"]
    assert [link["bytes_per_second"] for link in links] == pytest.approx([LINK] * 2, rel=0.15)
    told = read_json(run.plan)
    predicted, measured = told["predicted"], told["measured"]
    assert predicted["network"]["bytes_per_second"] == min(link["bytes_per_second"] for link in links)
    sending = predicted["seconds"]["sending"]
    print(f"links {[round(link['bytes_per_second'] / 1e6, 1) for link in links]} MB/s; ZeRO {stage}: ", end="")
    print(f"a step {measured['step_seconds']:.2f} s, {predicted['step_seconds']:.2f} predicted, {sending:.2f} sending")
    print([round(line["step_seconds"], 2) for line in training_curve(run.metrics)])
    assert told["error"]["step_seconds"] == pytest.approx(0, abs=0.25)


def test_weights_that_a_node_holds_once_more_do_not_cross_a_slow_link(hosts: Hosts, files: Path) -> None:
    """Two workers on each of two hosts, four passes a step: with ZeRO++'s hpZ one of them fetches weights over it."""
    home = home_on(hosts, HEAD, files)
    setting = "zero.stage=3", "cluster.workers=4", "cluster.resources_per_worker={CPU: 0.5}", "train.batch_size=16"
    curves, seconds = [], []
    for size in ("1", "auto"):
        name = f"hpz-{size}"
        sets = [
            word for each in (*setting, "train.steps=8", f"zero.hpz_partition_size={size}") for word in ("--set", each)
        ]
        home.distft("train", "tiny.yaml", "--name", name, *sets, timeout=900)
        run = Run(files / "runs" / name)
        assert decision(run, "zero.hpz_partition_size") == (1 if size == "1" else 2)
        curves.append(training_curve(run.metrics))
        seconds.append(measure(curves[-1])["step_seconds"])
        planned = read_json(run.plan)["predicted"]["step_seconds"] if run.plan.exists() else None
        print(f"hpZ {size}: a step {seconds[-1]:.2f} s, {planned} predicted")
    assert [step["loss"] for step in curves[1]] == [step["loss"] for step in curves[0]]
    assert seconds[1] < seconds[0]

"""The whole way through the command line, on a real Ray cluster with two ZeRO workers and a tiny model."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from distft.model.shape import llama_tensors
from distft.runs import read_json, read_lines, training_curve
from tests.integration.conftest import Home
from tests.support import ROOT, free_port

pytestmark = pytest.mark.ray

DASHBOARD = ROOT / "cluster" / "grafana-dashboard.json"

JOB = """\
model: {source: ./model, dtype: fp32}
task: {kind: language_modeling}
data:
  source: ./corpus.jsonl
  splits: {validation: 0.1, test: 0.1}
  max_tokens: 32
  overlong: split
train: {steps: 300, batch_size: 8, learning_rate: 1e-3, validate_every: {steps: 100}}
checkpoint: {every: {steps: 20}}
cluster: {workers: 2}
"""


@pytest.fixture(scope="module")
def finished(home: Home) -> Path:
    """A run that went the whole way; its terminal output lies beside it, and what Prometheus could read meanwhile."""
    (home.folder / "tiny.yaml").write_text(JOB)
    folder, process = home.folder / "runs" / "tiny", home.start("run", "tiny.yaml")
    scraped = ""
    while process.poll() is None:
        time.sleep(0.5)
        with urllib.request.urlopen(home.metrics, timeout=10) as answer:
            now = answer.read().decode()
        scraped = now if "distft_validation_loss{" in now else scraped
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    (folder / "scraped.txt").write_text(scraped)
    (folder / "output.txt").write_text(output)
    (folder / "errors.txt").write_text(errors)
    return folder


def digits(curve: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["sample_digest"]) for line in curve]


def test_a_run_leaves_what_the_contract_names(home: Home, finished: Path) -> None:
    assert (finished / "job.yaml").read_text() == JOB
    result, scores = read_json(finished / "result.json"), read_json(finished / "evaluation.json")
    assert result["status"] == "finished"
    assert result["step"] == 300
    assert result["best_step"] in (100, 200, 300)
    assert result["restarts"] == 0
    assert result["wall_seconds"] > 0
    for kind in ("base", "best", "difference"):
        more = {"p"} if kind == "difference" else set()
        assert set(scores[kind]["test"]["perplexity"]) == {"value", "low", "high", "n"} | more
    used = read_json(finished / "data" / "card.json")["rows"]["validation"]
    assert scores["best"]["validation"]["loss"]["n"] == used["kept"] + used["split"]
    assert read_json(finished / "resolved.json")["decisions"]["zero.stage"]["value"] == 2
    assert read_json(finished / "environment.json")["versions"]["deepspeed"]
    assert list((finished / "tensorboard").iterdir())


def test_invariant_6_each_look_at_the_test_split_is_recorded(finished: Path) -> None:
    looks = [look["model"] for look in read_json(finished / "result.json")["test_looks"]]
    assert looks[:2] == ["base", "best"]


def test_a_run_ends_with_its_report_and_examples(finished: Path) -> None:
    assert read_json(finished / "result.json")["paths"]["report"] == str(finished / "report.html")
    page = (finished / "report.html").read_text()
    for words in ("Perplexity went from", "Where the time went", "300 of 300", "Peak memory by rank"):
        assert words in page
    shown = read_json(finished / "examples.json")["test"]
    assert [one["place"] for one in shown["examples"]] == ["worst"] * 3 + ["median"] * 3 + ["best"] * 3
    values = [one["best_value"] for one in shown["examples"]]
    assert values == sorted(values, reverse=True)
    texts = [json.loads(line)["text"] for line in (finished.parents[1] / "corpus.jsonl").read_text().splitlines()]
    for one in shown["examples"]:
        assert one["text"].strip() in " ".join(texts[one["row"] - 1].split())
        assert one["base_value"] > 0


def test_the_metrics_have_the_fields_of_the_contract(home: Home, finished: Path) -> None:
    fields = (
        "epoch loss learning_rate grad_norm rows tokens supervised_tokens step_seconds tokens_per_second mfu "
        "peak_memory_bytes world_size micro_batch_size accumulation sample_digest"
    )
    curve = home.curve("tiny")
    assert [line["step"] for line in curve] == list(range(1, 301))
    for line in curve:
        assert set(fields.split()) <= set(line)
        assert line["world_size"] == 2
    kinds = [line["kind"] for line in read_lines(finished / "metrics.jsonl")]
    assert kinds.count("validation") == 3
    events = [line["event"] for line in read_lines(finished / "metrics.jsonl") if line["kind"] == "event"]
    assert events[0] == "start"
    assert {"checkpoint", "best", "finished"} <= set(events)


def test_a_run_is_measured_at_the_metrics_endpoint_of_ray(home: Home, finished: Path) -> None:
    """Each metric of training is there while it goes on, under the names that the dashboard asks for."""
    families = text_string_to_metric_families((finished / "scraped.txt").read_text())
    found = {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("run") == "tiny"
    }
    accuracy = "ray_distft_validation_accuracy"  # no classification
    assert found.keys() == set(re.findall(r"ray_distft_\w+", DASHBOARD.read_text())) - {accuracy}
    curve = home.curve("tiny")
    at = int(found["ray_distft_train_step"])
    assert found["ray_distft_train_tokens_total"] == sum(line["tokens"] for line in curve[:at])
    assert found["ray_distft_train_loss"] == pytest.approx(curve[at - 1]["loss"])
    assert found["ray_distft_train_steps"] == 300
    assert found["ray_distft_train_restarts"] == 0


def test_the_end_of_a_run_is_for_people(finished: Path) -> None:
    output = (finished / "output.txt").read_text()
    assert "Test split" in output
    assert "difference (paired)" in output
    assert "Next" in output
    assert len(output.splitlines()) < 60
    assert (finished / "errors.txt").read_text() == ""


def test_the_quickstart_says_at_most_80_lines_where_there_is_no_terminal(home: Home, finished: Path) -> None:
    """Each step and each part of the evaluation said, as where all of them take longer than the 30 s between lines."""
    command = "import distft.cli.view as view; view.PLAIN_INTERVAL_SECONDS = 0; from distft.cli import main; main()"
    smaller = {
        "model.source": str(home.folder / "model"),
        "model.sha256": "null",
        "data.source": str(home.folder / "corpus.jsonl"),
        "data.max_tokens": "32",
        "cluster.address": home.address,
    }
    words = [
        "run",
        str(ROOT / "launch" / "quickstart.yaml"),
        *(f"--set={key}={value}" for key, value in smaller.items()),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", command, *words],
        capture_output=True,
        text=True,
        env=home.environment,
        cwd=home.folder,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("  step 12/12  loss")]
    assert len([line for line in lines if " loss " in line and "/12" in line]) >= 10
    assert len(lines) <= 80, ran.stdout
    assert lines[-1].startswith("  ")
    assert ran.stderr == ""
    assert not re.search(r"WARNING|INFO|DeepSpeed|ray::|\x1b|it/s", ran.stdout)


def test_the_export_loads_without_us(finished: Path) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer("peace with", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert "distft" not in sys.modules
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(finished / "export")], capture_output=True, text=True, cwd="/", check=True
    )
    assert ran.stdout
    assert (finished / "export" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert "Scores on the test split" in (finished / "export" / "README.md").read_text()


def test_generate_is_the_exported_model(home: Home, finished: Path) -> None:
    once, _ = home.distft("generate", "tiny", "--prompt", "peace with", "--max-new-tokens", "8")
    again, _ = home.distft("generate", str(finished), "--prompt", "peace with", "--max-new-tokens", "8")
    assert once == again
    assert once.strip()


def test_evaluate_scores_other_models_and_splits_and_records_its_looks(home: Home, finished: Path) -> None:
    looks = len(read_json(finished / "result.json")["test_looks"])
    output, _ = home.distft("evaluate", "tiny", "--split", "validation", "--model", "last", "--json")
    scores = json.loads(output)
    assert scores == read_json(finished / "evaluation.json")
    assert scores["last"]["validation"]["loss"]["value"] < scores["base"]["validation"]["loss"]["value"]
    result = read_json(finished / "result.json")
    assert len(result["test_looks"]) == looks  # validation is no look at the test split
    if result["best_step"] == result["step"]:
        assert scores["last"]["validation"] == scores["best"]["validation"]
    _, errors = home.distft("evaluate", "tiny", "--split", "train", status=2)
    assert "validation, test" in errors


def test_export_writes_the_same_model_elsewhere(home: Home, finished: Path) -> None:
    home.distft("export", "tiny", "--to", "elsewhere")
    there, here = home.folder / "elsewhere", finished / "export"
    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    written = read_json(there / "distft.json")
    assert written["step"] == read_json(finished / "result.json")["best_step"]
    for name, sha256 in written["sha256"].items():
        assert hashlib.sha256((there / name).read_bytes()).hexdigest() == sha256


def test_the_name_of_a_run_is_taken_once(home: Home, finished: Path) -> None:
    _, errors = home.distft("run", "tiny.yaml", status=2)
    assert "exists already" in errors
    assert "--resume" in errors
    output, _ = home.distft("run", "tiny.yaml", "--resume")
    assert "finished already" in output
    _, errors = home.distft("train", "tiny.yaml", "--resume", "--set", "train.learning_rate=1e-2", status=2)
    assert "changed since this run began, in: train" in errors


def test_ray_and_torchrun_give_the_same_digits(home: Home, finished: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "distft.train", "tiny.yaml", "--name", "torchrun"]
    subprocess.run(command, check=True, env=home.environment, cwd=home.folder, capture_output=True, timeout=300)
    assert digits(home.curve("torchrun")) == digits(home.curve("tiny"))


def test_ctrl_c_checkpoints_and_resume_goes_on_digit_for_digit(home: Home, finished: Path) -> None:
    process = home.start("train", "tiny.yaml", "--name", "stopped")
    metrics = home.folder / "runs" / "stopped" / "metrics.jsonl"
    wait_for(lambda: len(training_curve(metrics)) >= 2, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, output + errors
    assert "--resume" in errors
    result = read_json(metrics.with_name("result.json"))
    assert result["status"] == "interrupted"
    assert 2 <= result["step"] < 300
    home.distft("train", "tiny.yaml", "--name", "stopped", "--resume")
    assert digits(home.curve("stopped")) == digits(home.curve("tiny"))


def test_a_killed_worker_is_replaced_and_the_curve_is_the_same(home: Home, finished: Path) -> None:
    process = home.start("train", "tiny.yaml", "--name", "killed", "--set", "cluster.max_failures=1")
    folder = home.folder / "runs" / "killed"
    wait_for(lambda: (folder / "checkpoints" / "step-000040" / "COMPLETE").exists(), process)
    victims = [worker for worker in psutil.process_iter(["pid", "name", "cmdline"]) if holds(worker, folder)]
    assert victims, "no worker process has the run's log open"
    victims[0].kill()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert digits(home.curve("killed")) == digits(home.curve("tiny"))
    assert read_json(folder / "result.json")["restarts"] == 1


def test_more_workers_than_the_cluster_holds(home: Home) -> None:
    _, errors = home.distft("train", "tiny.yaml", "--name", "many", "--set", "cluster.workers=99", status=4)
    assert "99 workers" in errors
    assert "holds 4" in errors
    assert not (home.folder / "runs" / "many").exists()


def test_wrong_data_is_refused_before_workers_start(home: Home) -> None:
    (home.folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    _, errors = home.distft("train", "tiny.yaml", "--name", "x", "--set", "data.source=./broken.jsonl", status=3)
    assert "broken.jsonl" in errors
    assert "line 2" in errors
    _, errors = home.distft("prepare", "tiny.yaml", "--set", "task.text=body", status=3)
    assert "body" in errors
    assert "text" in errors
    _, errors = home.distft("prepare", "tiny.yaml", "--set", "data.overlong=error", status=3)
    assert "p95" in errors
    assert not (home.folder / "runs" / "x").exists()


def test_a_loss_that_is_no_number_stops_the_run(home: Home) -> None:
    """One document holds a symbol whose embedding is NaN: the run ends there, once, and says so."""
    options = ["--set", "model.source=./poisoned", "--set", "checkpoint.every.steps=1"]
    _, errors = home.distft("train", "tiny.yaml", "--name", "nan", *options, status=5)
    curve = home.curve("nan")
    assert f"step {len(curve) + 1}:" in errors
    assert "corpus.jsonl:8" in errors
    assert "Traceback" not in errors
    folder = home.folder / "runs" / "nan"
    assert read_json(folder / "result.json")["status"] == "failed"
    kept = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/*/COMPLETE")]
    assert max(kept, default=0) == len(curve)


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended first\n{process.communicate()}"
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


def holds(process: psutil.Process, folder: Path) -> bool:
    """Whether a process of this machine writes to a rank's log of the run."""
    try:
        return any(
            Path(f"/proc/{process.pid}/fd/{number}").readlink().is_relative_to(folder / "logs") for number in (1, 2)
        )
    except OSError:
        return False


def test_json_output_is_one_document(home: Home, finished: Path) -> None:
    output, _ = home.distft("check", "tiny.yaml", "--json")
    assert json.loads(output)["settings"]["train"]["steps"] == 300
    output, _ = home.distft("prepare", "tiny.yaml", "--json")
    assert json.loads(output)["fingerprint"]


def test_what_cannot_fit_is_refused_before_workers_start(home: Home) -> None:
    """A model of 200 B parameters, of which there are headers alone: nothing of it could be loaded."""
    huge = home.folder / "huge"
    huge.mkdir()
    sizes = {"layers": 256, "hidden": 8192, "heads": 64, "kv_heads": 8, "intermediate": 28672, "vocabulary": 128256}
    header = {name: {"dtype": "BF16", "shape": shape} for name, shape in llama_tensors(**sizes).items()}
    (huge / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "num_hidden_layers": 256,
                "hidden_size": 8192,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
                "vocab_size": 128256,
            }
        )
    )
    content = json.dumps(header).encode()
    (huge / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    (home.folder / "huge.yaml").write_text(JOB.replace("./model", "./huge"))
    _, errors = home.distft("run", "huge.yaml", status=4)
    assert "cannot fit" in errors
    assert "it needs a smaller model, or larger devices" in errors
    assert not (home.folder / "runs" / "huge").exists()

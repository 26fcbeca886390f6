"""``distft plan`` from the outside: what it prints, refuses and how long it takes."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from distft.model.shape import llama_tensors
from distft.orchestrate.nodes.network import Link, Network

SIZES = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocabulary": 128256}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job with a model of 8 B parameters, of which there are a configuration and the weights' headers."""
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
    (model / "config.json").write_text(json.dumps(config))
    tensors = llama_tensors(**SIZES)
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in tensors.items()}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "rows.txt").write_text("A row.")
    (tmp_path / "job.yaml").write_text(
        "model: {source: model}\n"
        "task: {kind: language_modeling}\n"
        "data: {source: rows.txt, max_tokens: 4096, overlong: split}\n"
        "train: {steps: 100, batch_size: 64}\n"
    )
    return tmp_path


def plan(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command, and the seconds of a processor that it took: those of a clock are others' too."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "distft", "plan", "job.yaml", *words], cwd=folder, capture_output=True, text=True
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def test_a_plan_for_devices_that_are_not_here(folder: Path) -> None:
    done, _ = plan(folder, "--device", "H100", "--workers", "16", "--nodes", "2", "--price", "2.5", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["model"]["parameters"] == 8_030_261_248
    assert (told["workers"], told["nodes"], told["steps"]) == (16, 2, 100)
    (chosen,) = [one for one in told["plans"] if one["chosen"]]
    assert chosen["fits"]
    assert chosen["device_bytes"] <= 80e9
    assert chosen["device_bytes"] == sum(chosen["memory"][chosen["peak_moment"]].values())
    assert chosen["checkpoint_bytes"] == 12 * 8_030_261_248
    assert chosen["money"] == pytest.approx(chosen["hours"] * 16 * 2.5)
    assert not next(one for one in told["plans"] if one["stage"] == 0)["fits"]


def test_a_person_gets_a_table_with_reasons(folder: Path) -> None:
    done, _ = plan(folder, "--device", "H100", "--workers", "8")
    assert done.returncode == 0, done.stderr
    for words in (
        "8,030.3 M parameters",
        "H100 of 80.0 GB",
        "chosen",
        "zero.stage",
        "no room",
        "100 steps",
        "at least 192.7 GB",
    ):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines()[:14])) <= 120


def test_what_cannot_fit_is_refused_at_once_with_figures(folder: Path) -> None:
    done, seconds = plan(folder, "--device", "L4", "--workers", "1")
    assert done.returncode == 4
    assert "24.0 GB" in done.stderr
    assert "what would fit" in done.stderr
    fastest = min(seconds, *(plan(folder, "--device", "L4", "--workers", "1")[1] for _ in range(2)))
    assert fastest < 2.0


def test_a_refusal_is_one_json_document_too(folder: Path) -> None:
    done, _ = plan(folder, "--device", "L4", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["fits"] is False


@pytest.mark.parametrize(
    ("words", "said"), [(("--device", "Abacus"), "H100"), (("--device", "H100", "--nodes", "2"), "--nodes")]
)
def test_a_wrong_call_is_told(folder: Path, words: tuple[str, ...], said: str) -> None:
    done, _ = plan(folder, *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_machines_are_planned_with_the_network_that_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    small = llama_tensors(layers=2, hidden=64, heads=4, kv_heads=4, intermediate=128, vocabulary=1000)
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in small.items()}).encode()
    (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"intermediate_size": 128, "vocab_size": 1000}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    link = Link("a", "b", bytes_per_second=1e6, round_trip_seconds=0.04)
    Network(("x", "y"), (link,)).keep(tmp_path / "cache" / "network.json")
    done, _ = plan(folder, "--workers", "2", "--nodes", "2", "--set", "train.batch_size=2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["network"] == {"bytes_per_second": 1e6, "round_trip_seconds": 0.04}
    (chosen,) = [one for one in told["plans"] if one["chosen"]]
    assert chosen["seconds"]["sending"] > chosen["sent_bytes_per_step"] / 1e6 > 0

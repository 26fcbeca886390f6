"""Every job file in ``launch/`` but the quick start and its search, on its own data, whole, with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config import Job
from distft.runs import read_json, read_lines
from tests.integration.conftest import Home
from tests.support import ROOT
from tests.unit import tiny_models

pytestmark = pytest.mark.ray

ROWS = 60
METRICS = {
    "chat": ["rougeL", "chrf", "stop_rate", "length"],
    "classify": ["accuracy", "macro_f1", "calibration_error"],
    "lora": ["perplexity", "bits_per_byte"],
    "question_answering": ["exact_match", "token_f1", "stop_rate"],
    "summarize": ["rouge1", "rouge2", "rougeL", "stop_rate"],
    "translate": ["chrf", "bleu", "stop_rate"],
}


def test_each_job_file_has_a_line_here() -> None:
    """But the main job, which `make quickstart` runs, and its search: `benchmarks/search.py quickstart`."""
    assert sorted([*METRICS, "quickstart", "search"]) == sorted(path.stem for path in (ROOT / "launch").glob("*.yaml"))


@pytest.fixture(scope="module")
def chat_model(home: Home) -> Path:
    """A tiny model with SmolLM2's special tokens and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = home.folder / "chat-model"
    template = (ROOT / "tests/unit/fixtures/templates/smollm2.jinja").read_text()
    tokenizer = tiny_models.tokenizer(**{**tiny_models.SMOLLM2, "template": template})
    torch.manual_seed(1)
    shape = {**tiny_models.SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(job: str, folder: Path) -> str:
    """The data of a job file: a few of the rows that its recipe prints, or the address that it has."""
    (address,) = Job.load(ROOT / "launch" / f"{job}.yaml").data.addresses
    if not address.startswith("data/"):
        return address
    rows = folder / Path(address).name
    recipe = ROOT / "launch" / "data" / f"make_{rows.stem}.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run([sys.executable, str(recipe)], capture_output=True, check=True, env=environment, text=True)
    lines = made.stdout.splitlines(keepends=True)
    rows.write_text("".join(lines[:: max(1, len(lines) // ROWS)]))
    return str(rows)


@pytest.mark.parametrize("job", METRICS)
def test_a_job_file_runs_the_whole_way(home: Home, chat_model: Path, job: str) -> None:
    smaller = {
        "model.source": str(chat_model),
        "model.sha256": "null",
        "data.source": rows_of(job, home.folder),
        "data.limit": ROWS if job != "lora" else 12,  # of whole addresses
        "data.max_tokens": 1024,  # of bytes
        "data.overlong": "split" if job == "lora" else "truncate",
        "data.splits": "{validation: 0, test: 0.2}",  # validation is what test_run.py looks at
        "cluster.workers": 1,  # several are what test_run.py looks at; each imports for seconds
        "train.steps": 3,
        "evaluate.samples": 4,
        "evaluate.max_new_tokens": 8,
    }
    settings = [word for key, value in smaller.items() for word in ("--set", f"{key}={value}")]
    output, _ = home.distft("run", str(ROOT / "launch" / f"{job}.yaml"), *settings)
    folder = home.folder / "runs" / job
    assert read_json(folder / "result.json")["status"] == "finished"
    scores = read_json(folder / "evaluation.json")
    for name in METRICS[job]:
        for estimate in (scores["best"]["test"][name], scores["base"]["test"][name]):
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert name in scores["difference"]["test"]
    assert (folder / "export" / "model.safetensors").exists()
    assert (folder / "export" / "adapter" / "adapter_model.safetensors").exists()
    steps = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["supervised_tokens"] > 0 for line in steps)
    assert "Test split" in output
    used = "split" if job == "lora" else "kept"
    assert read_json(folder / "data" / "card.json")["rows"]["train"][used] > 0

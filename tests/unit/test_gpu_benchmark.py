"""The GPU benchmark, on a CPU: its own attention, its bookkeeping, and that it runs with little installed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Case, as_table, batches, build, cases, compare, wanted

ROOT = Path(__file__).parents[2]
SMALL = Case("tiny", rows=2, batch_size=2, tokens=96, dtype="fp32", attention="sdpa")
FIGURES = {
    "tokens_per_second": 1.0,
    "mfu": 0.5,
    "share_of_measured_product": 0.6,
    "step_seconds": 2.0,
    "peak_memory_bytes": 3e9,
    "predicted": {"step_seconds": 1.0, "peak_memory_bytes": 3e9},
    "error": {"step_seconds": -0.5, "peak_memory_bytes": 0.0},
}


def test_each_case_has_a_name_of_its_own_and_survives_json() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    assert [Case(**json.loads(json.dumps(asdict(case)))) for case in cases()] == cases()


def test_what_users_train_with_is_what_the_goals_are_measured_by() -> None:
    """DeepSpeed; and each goal by the reference engine as well, where DeepSpeed is not installed."""
    large = [case for case in cases() if case.model != "tiny"]
    plain = {(case.model, case.lora) for case in large if case.engine == "plain"}
    assert {(case.model, case.lora) for case in large if case.engine == "zero" and not case.documents} == plain
    for lora in (False, True):
        assert {case.model for case in large if case.lora == lora} == {"135M", "1B", "3B", "8B"}


@pytest.mark.parametrize("model", ["135M", "1B", "3B", "8B"])
def test_models_have_the_sizes_that_their_names_promise(model: str) -> None:
    """134.5 M, 1.24, 3.21 and 8.03 billion, as their model cards say."""
    sizes = {"135M": 134_515_008, "1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248}
    assert Case(model).shape.parameters == sizes[model]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_varlen_attention_gives_the_losses_and_gradients_of_the_mask(checkpointing: bool) -> None:
    (passes,) = batches(SMALL, 1)
    ((batch, lengths),) = passes
    assert len(lengths) > 2 * SMALL.rows  # several documents a row: there is something to keep apart
    found = []
    for attention in ("sdpa", "varlen"):
        model = build(replace(SMALL, attention=attention, checkpointing=checkpointing), torch.device("cpu")).train()
        loss, _ = model(batch)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-5)


def test_trained_is_what_an_adapter_has() -> None:
    pytest.importorskip("peft")
    case = replace(SMALL, lora=True)
    model = build(case, torch.device("cpu"))
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == case.trained


def test_it_runs_without_pydantic_ray_and_deepspeed() -> None:
    """A GPU machine may have torch and transformers, and little else."""
    script = (
        "import sys, json\n"
        "for name in ('pydantic', 'ruamel.yaml', 'ray', 'deepspeed', 'pyarrow', 'peft', 'datasets', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks import gpu\n"
        f"print(json.dumps(gpu.alone(gpu.Case(**{asdict(SMALL)!r}), 'cpu')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == gpu.COMPARED
    assert found["losses"][-1] < found["losses"][0]
    assert found["tokens_per_second"] > 0
    assert 0 < found["mfu"] < 1
    assert found["kernels"][0]["kernel"].startswith("(none")
    assert set(found["error"]) == {"peak_memory_bytes", "step_seconds"}


def test_what_is_known_is_not_measured_again_and_what_was_cut_short_is() -> None:
    chosen = [Case("1B", rows=rows) for rows in (1, 2, 4, 8)]
    known = {
        chosen[0].name: FIGURES,
        chosen[1].name: {"failed": "out of memory"},
        chosen[2].name: {"failed": "no time"},
    }
    assert list(wanted(known, chosen, again=False)) == chosen[2:]
    assert list(wanted(known, chosen, again=True)) == chosen


def test_losses_are_held_against_the_reference_by_their_type() -> None:
    results = {
        dtype: {**FIGURES, "case": asdict(replace(SMALL, dtype=dtype)), "losses": [2.0, 1.001]}
        for dtype in ("fp32", "bf16")
    }
    compare(results, [2.0, 1.0])
    assert results["bf16"]["equal"]
    assert not results["fp32"]["equal"]
    table = as_table({**results, "large": {"failed": "out of memory", "said": ""}})
    assert table.count("NOT EQUAL") == 1
    assert "| large | out of memory |" in table

"""What each rank holds at ZeRO 0 to 3 on 1, 2 and 4 ranks, beside ZeRO's formula and the planner's.

``python -m benchmarks.zero_memory`` trains SmolLM2-135M's architecture at a third of its depth (64 M parameters, random
weights, bf16) under torchrun with the engine alone, and looks at each rank just before the second update, when weights,
optimizer state and gradients are there and activations are gone: the resident set, with freed memory given back to the
system (glibc's malloc_trim, so that Linux is needed), less what the process held before the model. More ranks than
cores do no harm: nothing is timed. The formula is that of ZeRO, arXiv 1910.02054, figure 1; the planner's counts what
DeepSpeed does, as :mod:`distft.plan.memory` says.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.scaling import zero_bytes

ROOT = Path(__file__).parents[1]
SHAPE = {"layers": 10, "hidden": 576, "heads": 9, "kv_heads": 3, "intermediate": 1536, "vocabulary": 49152}
TOKENS = 64
#: Parts of the planner's that are there just before an update.
HELD = ("weights", "second copy of weights", "fp32 weights", "moments", "gradients", "bucket")


def resident_bytes() -> int:
    """This process's, without what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def rank(stage: int, dtype: str, hpz: int) -> None:
    """One rank; rank 0 prints what each of them holds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distft import engine as engines
    from distft.model import DTYPES, Batch, LossModel
    from distft.model.batch import IGNORED
    from distft.world import World

    torch.set_num_threads(1)
    engines.preload()
    world = World.from_environment()
    engines.join(world, engines.device_of(world))
    before = resident_bytes()
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=SHAPE["layers"],
        hidden_size=SHAPE["hidden"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["intermediate"],
        vocab_size=SHAPE["vocabulary"],
        tie_word_embeddings=True,
    )
    model = LossModel(LlamaForCausalLM(config).to(DTYPES[dtype]))
    settings = engines.Settings(DTYPES[dtype], stage, max_grad_norm=1.0, hpz_partition_size=hpz)
    engine = engines.open(model, settings, world)
    del model
    ids = torch.arange(TOKENS)[None] + world.rank
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORED)], dim=1)
    batch = Batch(ids, torch.arange(TOKENS)[None], labels)
    for step in range(2):
        for turn in range(2):
            engine.forward_backward(batch, 0.01, last=turn == 1, seed=step)
        held = resident_bytes() - before
        engine.step(1e-5)
    each = engine.gather({"held_bytes": held, "peak_bytes": engine.peak_memory_bytes()})
    if world.is_main:
        print(json.dumps(each))
    engine.close()
    engines.leave()


def measured(stage: int, ranks: int, dtype: str, hpz: int) -> list[dict[str, int]]:
    """What each of so many ranks holds."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words += ["-m", "benchmarks.zero_memory", "--rank", "--stages", str(stage), "--dtype", dtype, "--hpz", str(hpz)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"ZeRO {stage} on {ranks} ranks: exit {done.returncode}\n{done.stderr[-4000:]}")
    found: list[dict[str, int]] = json.loads(next(one for one in done.stdout.splitlines() if one.startswith("[{")))
    return found


def planned(stage: int, ranks: int, dtype: str, hpz: int) -> tuple[int, int]:
    """Bytes by ZeRO's formula, with ZeRO++'s second copy of the weights, and by the planner's parts."""
    from distft.model.shape import llama_tensors, of_config
    from distft.plan.memory import memory
    from distft.plan.setup import Setup

    config = {
        "num_hidden_layers": SHAPE["layers"],
        "hidden_size": SHAPE["hidden"],
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["kv_heads"],
        "intermediate_size": SHAPE["intermediate"],
        "vocab_size": SHAPE["vocabulary"],
    }
    shape = of_config(config, llama_tensors(**SHAPE, tied=True), 0, "here")
    setup = Setup(
        device_type="cpu",
        dtype=dtype,
        stage=stage,
        offload="none",
        checkpointing=False,
        workers=ranks,
        nodes=1,
        batch_size=2 * ranks,
        micro_batch_size=1,
        row_tokens=TOKENS,
        attended_tokens=TOKENS,
        masked=False,
        hpz=hpz,
    )
    parts = memory(shape, shape.parameters, setup).moments["update"]
    formula = zero_bytes(shape.parameters, shape.parameters, stage, ranks, dtype)
    formula += shape.parameters * setup.bytes // hpz if hpz > 1 else 0
    return formula, sum(parts.get(name, 0) for name in HELD)


def as_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| ZeRO | ranks | hpZ | held by a rank, MB | ZeRO's formula | over it | planner's | over it |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        held, formula, plan = one["held_bytes"], one["formula_bytes"], one["planned_bytes"]
        again = one["hpz"] if one["hpz"] > 1 else ""
        lines.append(
            f"| {one['stage']} | {one['ranks']} | {again} | {held / 1e6:,.0f} | {formula / 1e6:,.0f} "
            f"| {held / formula:.2f} | {plan / 1e6:,.0f} | {held / plan:.2f} |"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measures every stage on every number of ranks, and writes the results beside those that are known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hpz", type=int, default=1, help="ranks that hold stage 3's weights once more between them")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "zero-memory.json")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.rank:
        rank(arguments.stages[0], arguments.dtype, arguments.hpz)
        return
    known = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else []
    results = {(one["stage"], one["ranks"], one["dtype"], one["hpz"]): one for one in known}
    for stage, ranks in itertools.product(arguments.stages, arguments.ranks):
        each = measured(stage, ranks, arguments.dtype, arguments.hpz)
        formula, plan = planned(stage, ranks, arguments.dtype, arguments.hpz)
        most = {name: max(one[name] for one in each) for name in each[0]}
        found = {"stage": stage, "ranks": ranks, "dtype": arguments.dtype, "hpz": arguments.hpz, **most}
        found |= {"formula_bytes": formula, "planned_bytes": plan, "each": each}
        results[stage, ranks, arguments.dtype, arguments.hpz] = found
        in_order = [results[key] for key in sorted(results)]
        document = {"provenance": provenance(), "shape": SHAPE, "results": in_order}
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(as_table([found]).splitlines()[-1], flush=True)
    print(as_table(in_order))


if __name__ == "__main__":
    main()

"""Rows that two ranks share (``train.sequence_parallel_size: 2``), beside rows that each has for itself.

``python -m benchmarks.shared_rows`` trains SmolLM2-135M's architecture at a third of its depth, with 8 heads (two ranks
cannot divide its 9), random weights, ZeRO-2 and packed texts, under torchrun with the engine alone: a row of 2 T tokens
on one rank; rows of T tokens, one on each of two ranks; and a row of 2 T tokens that the two share. Told are seconds of
a step and the peak memory of a rank, each beside the planner's ratio, and how far the loss is off that of one rank. All
cases are run in turn, ``--repeats`` times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.provenance import provenance
from benchmarks.short_runs import ROOT, torchrun

if TYPE_CHECKING:
    from distft.plan.speed import Rates

CONFIG = {
    "num_hidden_layers": 10,
    "hidden_size": 576,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TEXT = 256
"""Tokens of each text in a row."""
STEPS = 6
"""Of a run; the first is not timed."""


@dataclass(frozen=True)
class Case:
    """Who has which row.

    Attributes:
        ranks: Number of ranks.
        sharing: Ranks that share a row.
        tokens: Of a row.
    """

    ranks: int
    sharing: int
    tokens: int


def cases(tokens: int) -> tuple[Case, ...]:
    """One rank with a long row, two with a short one each, two that share a long one."""
    return Case(1, 1, 2 * tokens), Case(2, 1, tokens), Case(2, 2, 2 * tokens)


def rank(case: Case) -> None:
    """One rank; rank 0 prints what was measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distft import engine as engines
    from distft.model import Batch, LossModel
    from distft.world import World

    torch.set_num_threads(1)
    world = World.from_environment()
    engines.join(world, engines.device_of(world))
    torch.manual_seed(1)
    model = LossModel(LlamaForCausalLM(LlamaConfig(**CONFIG)))
    settings = engines.Settings(stage=2, max_grad_norm=1.0, sequence_parallel_size=case.sharing)
    engine = engines.open(model, settings, world)
    del model
    draw = torch.Generator().manual_seed(world.rank // case.sharing)
    seconds, losses = [], []
    for step in range(STEPS):
        ids = torch.randint(CONFIG["vocab_size"], (1, case.tokens), generator=draw)
        positions = torch.arange(TEXT).repeat(case.tokens // TEXT)[None]
        engine.barrier()
        start = time.perf_counter()
        batch = Batch(ids, positions, ids.roll(-1, 1))
        loss = engine.forward_backward(batch, 1 / case.tokens, last=True, seed=step)
        engine.step(1e-4)
        seconds.append(time.perf_counter() - start)
        losses.append(engine.sum_over_ranks([float(loss.sum())])[0] / case.tokens)
    memory = max(engine.gather(engine.peak_memory_bytes()))
    if world.is_main:
        print(json.dumps({"step_seconds": seconds[1:], "peak_memory_bytes": memory, "losses": losses}))
    engine.close()
    engines.leave()


def measured(case: Case) -> dict[str, Any]:
    """What rank 0 of a case prints."""
    words = ["--ranks", str(case.ranks), "--sharing", str(case.sharing), "--tokens", str(case.tokens)]
    output = torchrun(Path(sys.executable), "-m", "benchmarks.shared_rows", "--rank", *words, ranks=case.ranks)
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith('{"step')))
    return found


def planned(case: Case, rates: Rates) -> dict[str, float]:
    """Seconds and bytes as the planner has them, uncorrected."""
    from distft.model.shape import llama_tensors, of_config
    from distft.plan.memory import memory
    from distft.plan.setup import Setup
    from distft.plan.speed import step_time

    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    names = ("layers", "hidden", "heads", "kv_heads", "intermediate")
    tensors = llama_tensors(
        **dict(zip(names, (CONFIG[size] for size in sizes), strict=True)), vocabulary=CONFIG["vocab_size"], tied=True
    )
    shape = of_config(CONFIG, tensors, 0, "here")
    setup = Setup(
        device_type="cpu",
        dtype="fp32",
        stage=2,
        offload="none",
        checkpointing=False,
        workers=case.ranks,
        nodes=1,
        batch_size=case.ranks // case.sharing,
        micro_batch_size=1,
        row_tokens=case.tokens,
        attended_tokens=TEXT,
        masked=False,
        sharing=case.sharing,
    )
    time_ = step_time(shape, shape.parameters, setup, rates)
    return {"seconds": time_.seconds, "bytes": memory(shape, shape.parameters, setup).device_bytes}


def summary(runs: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians and ratios of all runs: of shared rows to those of the other two cases."""
    by_case = {case: [run for run in runs if run["case"] == asdict(case)] for case in cases(tokens)}
    seconds = {
        case: statistics.median(s for run in found for s in run["step_seconds"]) for case, found in by_case.items()
    }
    memory = {case: statistics.median(run["peak_memory_bytes"] for run in found) for case, found in by_case.items()}
    losses = {case: found[0]["losses"] for case, found in by_case.items()}
    long, short, shared = cases(tokens)
    names = {long: "one rank, long row", short: "two ranks, short rows", shared: "two ranks, shared long row"}
    plans = {case: by_case[case][0]["planned"] for case in by_case}
    return {
        "seconds": {names[case]: seconds[case] for case in by_case},
        "bytes": {names[case]: memory[case] for case in by_case},
        "seconds_over_one_rank": seconds[shared] / seconds[long],
        "seconds_over_own_rows": seconds[shared] / seconds[short],
        "planned_seconds_over_own_rows": plans[shared]["seconds"] / plans[short]["seconds"],
        "memory_over_one_rank": memory[shared] / memory[long],
        "memory_over_own_rows": memory[shared] / memory[short],
        "planned_memory_over_one_rank": plans[shared]["bytes"] / plans[long]["bytes"],
        "loss_off_one_rank": max(abs(a / b - 1) for a, b in zip(losses[shared], losses[long], strict=True)),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measures all cases and writes them with their ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_rows", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="T: a multiple of 256")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "shared-rows.json")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sharing", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.rank:
        rank(Case(arguments.ranks, arguments.sharing, arguments.tokens))
        return
    import torch

    from distft.plan.hardware import Hardware, share_of_peak
    from distft.plan.speed import Rates

    hardware = Hardware.glance()
    rates = Rates.of_cpu(share_of_peak(hardware, torch.float32, 2, 1), hardware.at_once(1))
    runs: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        for case in cases(arguments.tokens):
            runs.append({"case": asdict(case), "planned": planned(case, rates), **measured(case)})
            print(
                json.dumps({name: runs[-1][name] for name in ("case", "step_seconds", "peak_memory_bytes")}), flush=True
            )
    told = summary(runs, arguments.tokens)
    document = {"provenance": provenance(), "config": CONFIG, "text_tokens": TEXT, **told, "runs": runs}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()

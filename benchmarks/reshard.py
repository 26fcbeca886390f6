"""Re-sharding ZeRO-3 state from two ranks to one and from one to two: seconds, and memory of each rank.

``python benchmarks/reshard.py`` makes SmolLM2-135M's architecture at three depths (thirty layers are SmolLM2-135M
itself) with random weights, makes one step so that the optimizer has a state, writes it as a checkpoint's files, and
takes it up in fresh processes of the other number. Memory is a rank's resident set: before, and the most while the
state is taken up (VmHWM of proc(5), reset first), so that Linux is needed. Between the two lies what taking it up costs
beyond what training holds anyway; it is told as a multiple of the rank's share of the state as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402

#: SmolLM2-135M's (https://huggingface.co/HuggingFaceTB/SmolLM2-135M), but for its depth.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MOVES = ((2, 1), (1, 2))


def open_engine(layers: int, width: int) -> Any:
    """A ZeRO-3 engine in fp32 over a model with random weights, equal on all ranks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distft import engine as engines
    from distft.model import LossModel
    from distft.world import World

    torch.manual_seed(1)
    shape = {**SHAPE, "hidden_size": width, "intermediate_size": width * 8 // 3}
    shape |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 192}
    model = LossModel(LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers)))
    world = World.from_environment()
    return engines.open(model, engines.Settings(torch.float32, stage=3), world)


def one_step(engine: Any) -> None:
    """One update with a short row on every rank: the optimizer has a state after it."""
    import torch

    from distft.model import Batch
    from distft.model.batch import IGNORED

    ids = torch.arange(16).view(1, -1)
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORED)], dim=1)
    engine.forward_backward(Batch(ids, torch.arange(16).view(1, -1), labels), 1 / 15, last=True, seed=1)
    engine.step(1e-4)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def rank(arguments: argparse.Namespace) -> None:
    """One rank: takes the state of ``--take`` up, where given, and leaves its own in ``--leave``."""
    from distft import engine as engines
    from distft.checkpoint.shards import Shards, content

    engine = open_engine(arguments.layers, arguments.width)
    facts: dict[str, Any] = {}
    if arguments.take:
        engine.barrier()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        began = time.perf_counter()
        engine.restore(Shards(sorted(arguments.take.iterdir())))
        engine.barrier()
        facts = {"seconds": time.perf_counter() - began, "bytes_before": before, "bytes_most": resident("VmHWM")}
    else:
        one_step(engine)
    snapshot = engine.snapshot().hold()
    facts["share_bytes"] = snapshot.bytes
    with (arguments.leave / f"rank-{engine.world.rank:05d}.safetensors").open("wb") as file:
        file.writelines(content(snapshot))
    (arguments.leave.parent / f"facts-{engine.world.rank}.json").write_text(json.dumps(facts))
    engines.leave()


def ranks(count: int, layers: int, width: int, leave: Path, take: Path | None = None) -> list[dict[str, Any]]:
    """Runs :func:`rank` in so many processes of one thread; each one's facts."""
    leave.mkdir()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
    words += ["--layers", str(layers), "--width", str(width), "--leave", str(leave)]
    words += ["--take", str(take)] if take else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"a rank failed:\n{done.stderr[-4000:]}")
    return [json.loads((leave.parent / f"facts-{number}.json").read_text()) for number in range(count)]


def digest(folder: Path) -> dict[str, str]:
    """The state in a folder, however it is split: a hash of each tensor of each parameter."""
    from distft.checkpoint.shards import Shards
    from distft.engine import KINDS

    state = Shards(sorted(folder.iterdir()))
    sizes = {name: math.prod(shape) for name, shape in state.shapes.items()}
    return {
        f"{kind}/{name}": hashlib.sha256(state.read(name, kind, 0, size).numpy().tobytes()).hexdigest()
        for name, size in sizes.items()
        for kind in KINDS
    }


def move(source: int, target: int, layers: int, width: int, scratch: Path) -> dict[str, Any]:
    """Takes up with ``target`` ranks what ``source`` ranks left; the most over the ranks."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    ranks(source, layers, width, folder / "left")
    facts = ranks(target, layers, width, folder / "taken", take=folder / "left")
    same = digest(folder / "left") == digest(folder / "taken")
    shutil.rmtree(folder)
    worst = max(facts, key=lambda one: one["bytes_most"] - one["bytes_before"])
    beyond = worst["bytes_most"] - worst["bytes_before"]
    return {
        "seconds": max(one["seconds"] for one in facts),
        "state_bytes": sum(one["share_bytes"] for one in facts),
        "share_bytes": worst["share_bytes"],
        "bytes_before": worst["bytes_before"],
        "bytes_most": worst["bytes_most"],
        "beyond_before_over_share": beyond / worst["share_bytes"],
        "same_state": same,
    }


def main() -> None:
    """Measures and writes ``benchmarks/baselines/reshard.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30, 60], help="depths of the models")
    parser.add_argument("--width", type=int, default=576, help="hidden size, a multiple of 192")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--leave", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--take", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "reshard.json")
    arguments = parser.parse_args()
    if arguments.leave:
        (arguments.layers,) = arguments.layers
        rank(arguments)
        return
    seen: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(arguments.repeats):
            for layers in arguments.layers:
                for source, target in MOVES:
                    once = move(source, target, layers, arguments.width, Path(scratch))
                    seen.setdefault(f"{layers} layers, {source} -> {target}", []).append(once)
                    print(f"{layers} layers, {source} -> {target}", json.dumps(once), flush=True)
    assert all(one["same_state"] for runs in seen.values() for one in runs), "a state came out as another one"
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0] if key != "same_state"}
        for name, runs in seen.items()
    }
    for one in medians.values():
        one["bytes_per_second"] = one["state_bytes"] / one["seconds"]
    document = {"provenance": provenance(), "width": arguments.width, "median": medians, "runs": seen}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()

"""From command to first step: where the seconds go, and how many of them are ours.

``python benchmarks/startup.py`` starts, in turn, ``distft train`` of a tiny job whose data is prepared already, and a
baseline: a script that starts Ray and a TorchTrainer with as many workers, which import what ours import (torch,
transformers' Llama, DeepSpeed), meet in a process group, and return. It has the settings of Ray that ours has. What
distft takes beyond the baseline is ours.
"""

from __future__ import annotations

import argparse
import json
import os
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
from distft.runs import read_lines  # noqa: E402
from tests.distributed import tiny  # noqa: E402

BASELINE = """
import importlib, logging, os, sys, threading, time
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
import ray
threading.Thread(target=importlib.import_module, args=["ray.train.torch"], daemon=True).start()
ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
print("ray", time.time(), flush=True)
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def worker():
    import time
    began = time.time()
    import torch
    from transformers import LlamaForCausalLM
    import deepspeed
    torch.distributed.barrier()
    return began, time.time()

trainer = TorchTrainer(
    worker,
    torch_config=TorchConfig(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=int(sys.argv[1]), resources_per_worker={"CPU": 1}),
    run_config=RunConfig(name="baseline", storage_path=sys.argv[2]),
)
began, ready = trainer.fit().return_value
print("worker", began, flush=True)
print("imported", ready, flush=True)
"""

JOB = """\
model: {source: ./model, dtype: fp32}
task: {kind: language_modeling}
data: {source: ./corpus.jsonl, max_tokens: 64, overlong: split, splits: {validation: 0.1, test: 0.1}}
train: {steps: 3, batch_size: 8}
cluster: {address: local, workers: %d}
"""


def baseline(folder: Path, workers: int) -> dict[str, float]:
    """Seconds from the command until Ray runs, until a worker's function begins, until its imports are done."""
    start = time.time()
    command = [sys.executable, "-c", BASELINE, str(workers), str(folder / "ray")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: float(at) - start for name, at in (line.split() for line in output.splitlines())}


def ours(folder: Path, repeat: int) -> dict[str, float]:
    """Seconds from the command until training begins on the workers, and until its first step begins and ends."""
    name = f"run-{repeat}"
    environment = {**os.environ, "DISTFT_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    start = time.time()
    command = [sys.executable, "-m", "distft", "train", str(folder / "tiny.yaml"), "--name", name]
    subprocess.run(
        [*command, "--runs", str(folder / "runs")], check=True, capture_output=True, env=environment, text=True
    )
    records = list(read_lines(folder / "runs" / name / "metrics.jsonl"))
    begun = next(record for record in records if record["kind"] == "event")
    first = next(record for record in records if record["kind"] == "train")
    return {
        "engine ready": begun["time"] - start,
        "first step begins": first["time"] - first["step_seconds"] - start,
        "first step done": first["time"] - start,
    }


def check_seconds(folder: Path) -> float:
    """Seconds of ``distft check``, as a process."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "distft", "check", str(folder / "tiny.yaml")], check=True, capture_output=True
    )
    return time.perf_counter() - start


def main() -> None:
    """Measures and writes ``benchmarks/baselines/startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    seen: dict[str, list[Any]] = {"baseline": [], "ours": [], "check": []}
    with tempfile.TemporaryDirectory(prefix="dft") as temporary:
        folder = Path(temporary)
        tiny.make(folder)
        (folder / "tiny.yaml").write_text(JOB % arguments.workers)
        ours(folder, 0)  # prepares the data and warms the disk's cache
        for repeat in range(1, arguments.repeats + 1):
            seen["baseline"].append(baseline(folder, arguments.workers))
            seen["ours"].append(ours(folder, repeat))
            seen["check"].append(check_seconds(folder))
            print(json.dumps({name: values[-1] for name, values in seen.items()}), flush=True)
    medians = {
        kind: {name: statistics.median(one[name] for one in seen[kind]) for name in seen[kind][0]}
        for kind in ("baseline", "ours")
    }
    differences = [
        mine["first step done"] - theirs["imported"]
        for mine, theirs in zip(seen["ours"], seen["baseline"], strict=True)
    ]
    result = {
        "median_seconds": medians,
        "ours_beyond_ray_and_imports": statistics.median(differences),
        "check_seconds": statistics.median(seen["check"]),
    }
    document = {"provenance": provenance(), "workers": arguments.workers, **result, "runs": seen}
    path = ROOT / "benchmarks" / "baselines" / "startup.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

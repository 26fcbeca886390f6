"""The data card: what became of every row of the source, and what a reader should know before training on the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.data.duplicates import Leaks
from distft.data.example import FATES, KEPT, SPLIT
from distft.data.splits import SPLITS

NO_SPLIT = "none"  # rows without text belong to no split
_EXAMPLES = 5
_SHOWN = 3
_LABELS = 8
_EXCERPT = 40  # letters
_BARS = " ▁▂▃▄▅▆▇█"


def rows_by_fate(splits: NDArray[np.int8], fates: NDArray[np.int8]) -> dict[str, dict[str, int]]:
    """Rows of the source by split and fate; every row is counted once."""
    counts: dict[str, dict[str, int]] = {}
    for number, split in enumerate((*SPLITS, NO_SPLIT)):
        chosen = fates[splits == (number if split != NO_SPLIT else -1)]
        found = np.bincount(chosen, minlength=len(FATES)).tolist()
        counts[split] = {fate: count for fate, count in zip(FATES, found, strict=True) if count}
    return counts


def length_statistics(tokens: NDArray[np.int32]) -> dict[str, Any]:
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


def token_counts(tokens: NDArray[np.int32], supervised: NDArray[np.int32], max_tokens: int) -> dict[str, int]:
    """Tokens of a split's rows: ``all`` without padding, ``padding`` up to ``max_tokens`` a row, ``supervised``."""
    used = int(tokens.sum(dtype=np.int64))
    return {"padding": len(tokens) * max_tokens - used, "all": used, "supervised": int(supervised.sum(dtype=np.int64))}


def leaks(found: Leaks, shown: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Copies across splits as plain values: how many, and the most similar with what ``shown`` tells of each."""
    return {
        "documents": found.documents,
        "pairs": found.pairs,
        "listed": [
            {"first": shown(leak.first), "second": shown(leak.second), "similarity": round(leak.similarity, 4)}
            for leak in found.listed
        ],
    }


def examples(place: Callable[[int], dict[str, Any]], fates: NDArray[np.int8]) -> dict[str, list[dict[str, Any]]]:
    """Where the first few rows of each fate stand that is not the whole row used."""
    result = {}
    for number, fate in enumerate(FATES):
        chosen = np.flatnonzero(fates == number)[:_EXAMPLES].tolist()
        if chosen and fate not in (KEPT, SPLIT):
            result[fate] = [place(one) for one in chosen]
    return result


def unlearnt(place: Callable[[int], dict[str, Any]], answers: NDArray[np.int32]) -> dict[str, Any]:
    """The conversations that learn their last answer only: how many, the other answers, and where the first stand."""
    documents = np.flatnonzero(answers)
    return {
        "documents": len(documents),
        "answers": int(answers.sum(dtype=np.int64)),
        "listed": [place(one) for one in documents[:_EXAMPLES].tolist()],
    }


def files(count: int) -> str:
    """``1 file``."""
    return f"{count:,} file{'' if count == 1 else 's'}"


def describe(card: dict[str, Any]) -> str:
    """The card for a person, compact."""
    source = card["source"]
    lines = [
        f"{source['rows']:,} rows from {files(source['files'])} ({source['bytes'] / 1e6:,.1f} MB), "
        f"fingerprint {card['fingerprint'][:12]}",
        *(f"{name}: {json.dumps(fact, ensure_ascii=False)}" for name, fact in card["task"].items()),
        f"{'split':<12}{'documents':>10}{'rows':>10}{'tokens':>14}{'supervised':>14}{'share':>7}{'fill':>7}  fates",
        *(_split_line(card, split) for split in SPLITS),
        *_fate_lines(card),
        *_unlearnt_lines(card["unlearnt"]),
        *_label_lines(card["labels"]),
        *_length_lines(card),
        *_leak_lines(card["leaks"]),
    ]
    return "\n".join(lines)


def _split_line(card: dict[str, Any], split: str) -> str:
    fates, tokens = card["rows"][split], card["tokens"][split]
    room = tokens["all"] + tokens["padding"]
    told = ", ".join(f"{fate} {count:,}" for fate, count in fates.items())
    share = tokens["supervised"] / tokens["all"] if tokens["all"] else 0
    return (
        f"{split:<12}{sum(fates.values()):>10,}{card['packed'][split]:>10,}{tokens['all']:>14,}"
        f"{tokens['supervised']:>14,} {share:>6.1%}{tokens['all'] / room if room else 0:>7.1%}  {told or '-'}"
    )


def _fate_lines(card: dict[str, Any]) -> Iterator[str]:
    for fate, places in card["examples"].items():
        count = sum(fates.get(fate, 0) for fates in card["rows"].values())
        yield f"{fate}: {count:,} rows, {_told(places, count)}"


def _unlearnt_lines(unlearnt: dict[str, Any]) -> Iterator[str]:
    if count := unlearnt["documents"]:
        yield (
            f"last answer only: {count:,} conversations, because the template rewrites earlier turns "
            f"({unlearnt['answers']:,} answers are not learnt): {_told(unlearnt['listed'], count)}"
        )


def _told(places: list[dict[str, Any]], count: int) -> str:
    told = ", ".join(f"{place['source']} row {place['row']:,}" for place in places[:_SHOWN])
    return f"{told}{', ...' if count > _SHOWN else ''}"


def _label_lines(labels: dict[str, Any]) -> Iterator[str]:
    for split, counts in labels["rows"].items() if labels["names"] else ():
        total = sum(counts.values())
        if total:
            most = sorted(counts.items(), key=lambda item: -item[1])
            told = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in most[:_LABELS])
            more = f", {len(most) - _LABELS:,} more" if len(most) > _LABELS else ""
            yield f"labels of {split}: {told}{more}"


def _length_lines(card: dict[str, Any]) -> Iterator[str]:
    lengths = card["lengths"]
    told = ", ".join(f"{name} {lengths[name]:,}" for name in ("min", "median", "p95", "max") if name in lengths)
    if "histogram" in lengths:
        edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["counts"]
        first = next(place for place, count in enumerate(counts) if count)
        told += f"   {edges[first]:,} {''.join(_bar(count, max(counts)) for count in counts[first:])} {edges[-1]:,}"
    yield f"tokens a document: {told}"
    for name, cut in card["cut"].items():
        yield f"cut off {name}: {cut['tokens']:,} tokens in {cut['documents']:,} documents"


def _bar(count: int, most: int) -> str:
    return _BARS[-(-count * (len(_BARS) - 1) // most)]


def _leak_lines(leaked: dict[str, Any]) -> Iterator[str]:
    copies = sum(leaked["exact"]["within"].values())
    yield (
        f"exact copies: {copies:,} within a split, {leaked['exact']['documents']:,} held-out documents "
        f"also in another split; nearly the same: {leaked['near']['documents']:,}"
    )
    for leak in (*leaked["exact"]["listed"][:_SHOWN], *leaked["near"]["listed"][:_SHOWN]):
        places = [f"{leak[side]['split']} {leak[side]['source']}:{leak[side]['row']}" for side in ("first", "second")]
        yield f"  {' ~ '.join(places)} ({leak['similarity']:.2f}) {leak['second']['text'][:_EXCERPT]!r}"

"""What a run came to, as a few lines for a person."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from distft.runs import Run, read_json

#: Lower is better for each of these.
TITLES = {"perplexity": "perplexity", "bits_per_byte": "bits per byte", "loss": "loss (nats per token)"}


def score_lines(scores: dict[str, Any], split: str) -> list[str]:
    """Base beside tuned on a split, with 95 % intervals, one line a metric.

    Args:
        scores: ``evaluation.json``.
        split: validation or test.
    """
    columns = {
        kind: scores[kind][split] for kind in ("base", "best", "last", "difference") if split in scores.get(kind, {})
    }
    if not columns:
        return []
    first = next(iter(columns.values()))
    n = next(iter(first.values()))["n"]
    lines = [
        f"{split.capitalize()} split, {n} documents, 95 % intervals",
        f"  {'':<22}" + "".join(f"{HEADINGS[kind]:<28}" for kind in columns),
    ]
    for name in first:
        cells = "".join(f"{cell(column[name]):<28}" for column in columns.values())
        lines.append(f"  {TITLES.get(name, name):<22}{cells}".rstrip())
    return lines


HEADINGS = {"base": "base", "best": "tuned", "last": "last", "difference": "difference (paired)"}


def cell(estimate: dict[str, float]) -> str:
    """``17.31 (16.02 to 18.55)``."""
    return f"{estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"


def verdict(scores: dict[str, Any], split: str) -> str:
    """Whether the tuned model is better, and how sure that is."""
    change = scores.get("difference", {}).get(split, {}).get("perplexity")
    if change is None:
        return ""
    if change["high"] < 0:
        return "Better than the base model: the interval of the paired difference excludes zero."
    if change["low"] > 0:
        return "Worse than the base model: the interval of the paired difference excludes zero."
    return "No clear difference from the base model: the interval includes zero. More steps or more data may tell."


def summary(run: Run, job: Path) -> str:
    """The end of ``distft run``: scores, the same prompt by both models, where things are, what to try next.

    Args:
        run: The finished run.
        job: The job file, as the person named it.
    """
    result = read_json(run.result)
    lines = [""]
    if run.evaluation.exists():
        scores = read_json(run.evaluation)
        lines += [*score_lines(scores, "test"), verdict(scores, "test"), ""]
    sample = result.get("sample")
    if sample:
        lines.append(f"Prompt  {sample['prompt']}")
        lines += [
            f"  {HEADINGS[kind]:<6}{' '.join(sample[kind].split())}" for kind in ("base", "best") if kind in sample
        ]
        lines.append("")
    words = " ".join(sample["prompt"].split()[:5]) if sample else "Once upon a time"
    distft = "distft" if shutil.which("distft") else sys.argv[0]  # an environment that was not activated
    lines += [
        f"Run     {run.folder}",
        f"Model   {run.export}  (loads with transformers' from_pretrained)",
        "",
        "Next",
        f"  {distft} generate {run.name} --prompt {shlex.quote(words)} --temperature 0.8",
        f"  {distft} evaluate {run.name} --model last",
        f"  {distft} run {job} --name {run.name}-longer --set train.steps={3 * result['step']}",
    ]
    return "\n".join(lines)

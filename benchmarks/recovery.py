"""What checkpoints cost training, and what a killed worker costs: SmolLM2-135M, two ZeRO-2 workers.

``python benchmarks/recovery.py`` trains twice by ``distft train launch/quickstart.yaml``, two rows of 512 tokens a
step:

- undisturbed, with a checkpoint every few steps; what a save costs is told as a share of 20 steps. It is the time by
  which the steps from the one after it to the one that commits it take longer than the median of the steps with no save
  beside them. Its blocking part is what its own event says, beside that of the last checkpoint, which training waits
  for as it would for a synchronous save.
- with a worker killed (SIGKILL) at a random moment of every five minutes. The parts from the kill to the next step, and
  goodput by the run's own ledger, from its first step on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from distft.ledger.audit import audit  # noqa: E402
from distft.ledger.goodput import goodput  # noqa: E402
from distft.ledger.plan import plan_of  # noqa: E402
from distft.orchestrate.proof import faults  # noqa: E402
from distft.orchestrate.proof.disturbance import Driver  # noqa: E402
from distft.runs import Run, read_json, read_lines  # noqa: E402
from distft.train.folder import job_of  # noqa: E402

BASELINE = ROOT / "benchmarks" / "baselines" / "recovery.json"
JOB = ROOT / "launch" / "quickstart.yaml"
COMMON = ["train.batch_size=2", "cluster.address=local", "evaluate.samples=4", "checkpoint.budget=40GB"]


def driver_of(run: Run, settings: list[str]) -> Driver:
    """``distft train`` of the quickstart, not started yet; it is validated at its end only."""
    words = [sys.executable, "-m", "distft", "train", str(JOB), "--name", run.name, "--runs", str(run.folder.parent)]
    settings = [*COMMON, *settings, "train.validate_every=1.0"]
    return Driver([*words, *(word for one in settings for word in ("--set", one))], run.logs / "driver.log")


def costs(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What each save but the first and the last cost the steps beside it."""
    times = {line["step"]: line["time"] for line in lines if line["kind"] == "train"}
    took = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    saves = [line for line in lines if line.get("event") == "checkpoint"]
    *beside, last = [line for line in saves if line["step"] > 0]
    windows = {}
    for save in beside:
        committed = next(step for step, at in times.items() if at >= save["time"] or step == max(times))
        windows[save["step"]] = range(save["step"] + 1, committed + 1)
    quiet = [seconds for step, seconds in took.items() if not any(step in window for window in windows.values())]
    step_seconds = statistics.median(quiet)
    found = [
        {
            "step": save["step"],
            "steps_beside": len(windows[save["step"]]),
            "cost_seconds": sum(took[step] - step_seconds for step in windows[save["step"]]),
            "blocking_seconds": save["blocking_seconds"],
            "write_seconds": save["write_seconds"],
        }
        for save in beside
    ]
    cost = statistics.median(one["cost_seconds"] for one in found)
    blocking = statistics.median(one["blocking_seconds"] for one in found)
    return {
        "bytes": last["bytes"],
        "step_seconds": step_seconds,
        "quiet_steps_seconds": [round(seconds, 3) for seconds in quiet],
        "saves": found,
        "overhead_every_20_steps": cost / (20 * step_seconds),
        "synchronous_seconds": last["blocking_seconds"],
        "blocking_over_synchronous": blocking / last["blocking_seconds"],
    }


def wait_for(run: Run, driver: Driver, condition: Callable[[list[dict[str, Any]]], Any], until: float) -> bool:
    """Waits until a condition of the metrics' lines is met; False where it is not by ``until``."""
    while time.time() < until:
        if driver.status is not None:
            raise SystemExit(f"the run ended: {driver.said()}")
        if run.metrics.exists() and condition(list(read_lines(run.metrics))):
            return True
        time.sleep(0.1)
    return False


def trained(lines: list[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    """Steps made by workers that began after a moment."""
    begun = [n for n, line in enumerate(lines) if line["time"] > since and "workers" in line]
    return [line for line in lines[begun[0] :] if line["kind"] == "train"] if begun else []


def kill_one(run: Run, driver: Driver, draw: random.Random) -> dict[str, float]:
    """Kills a worker; the seconds until the next step was made, by what they went into."""
    worker = faults.worker_of(run, draw.random())
    if worker is None:
        raise SystemExit("there is no worker to kill")
    killed = time.time()
    print(faults.kill(worker), flush=True)
    wait_for(run, driver, lambda lines: trained(lines, killed), killed + 300)
    lines = list(read_lines(run.metrics))
    place = run.logs / "rank-0.json"
    noticed = next(line["time"] for line in lines if line["time"] > killed and line.get("event") == "lost")
    begun = next(line["time"] for line in lines if line["time"] > killed and line.get("event") == "restart")
    moments = [
        ("the driver sees it and ends what is left", noticed),
        ("the next group is asked for", float(read_json(place)["attempt"])),
        ("Ray starts its processes", place.stat().st_mtime),
        ("imports, model, checkpoint, probe loss", begun),
        ("first step", trained(lines, killed)[0]["time"]),
    ]
    parts, before = {}, killed
    for name, moment in moments:
        parts[name], before = round(moment - before, 2), moment
    return {**parts, "all": round(before - killed, 2)}


def disturbed(run: Run, kills: int, period: float, every: int, seed: int) -> dict[str, Any]:
    """A run whose worker is killed once in every period."""
    draw = random.Random(seed)
    driver = driver_of(run, ["train.steps=10000", f"checkpoint.every.steps={every}", f"cluster.max_failures={kills}"])
    driver.start()
    try:
        wait_for(run, driver, lambda lines: trained(lines, 0.0), time.time() + 300)
        lines = list(read_lines(run.metrics))
        began = trained(lines, 0.0)[0]["time"] - trained(lines, 0.0)[0]["step_seconds"]
        found = []
        for number in range(kills):
            wait_for(run, driver, lambda _: False, began + (number + draw.uniform(0.2, 0.8)) * period)
            found.append(kill_one(run, driver, draw))
            print(json.dumps(found[-1]), flush=True)
        wait_for(run, driver, lambda _: False, began + kills * period)
    finally:
        driver.kill()
    lines = list(read_lines(run.metrics))
    spent = goodput(lines)
    wall = spent.wall - spent.startup
    lost = (spent.restart + spent.replay) / kills
    unharmed = spent.compute / (wall - spent.restart - spent.replay)
    return {
        "kills": found,
        "checkpoint_every_steps": every,
        "period_seconds": period,
        "goodput": spent.compute / wall,
        "goodput_with_first_start": spent.share,
        "parts_seconds": dataclasses.asdict(spent),
        "lost_seconds_per_kill": lost,
        "goodput_at_one_kill_an_hour": unharmed * (1 - lost / 3600),
        "every_row_once": audit(plan_of(job_of(run), run), run).sound,
        "seed": seed,
    }


def main() -> None:
    """Measures and writes ``benchmarks/baselines/recovery.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=27, help="of the undisturbed run")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--period", type=float, default=300.0, help="seconds with one kill")
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints while workers are killed")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--only", choices=["saves", "kills"])
    arguments = parser.parse_args()
    known = read_json(BASELINE) if BASELINE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "kills":
            facts = provenance()
            run = Run(Path(folder) / "undisturbed")
            driver_of(run, [f"train.steps={arguments.steps}", "checkpoint.every.steps=6"]).run()
            known["saves"] = {"provenance": facts, **costs(list(read_lines(run.metrics)))}
            BASELINE.write_text(json.dumps(known, indent=2) + "\n")
            print(json.dumps(known["saves"], indent=2), flush=True)
        if arguments.only != "saves":
            facts = provenance()
            run = Run(Path(folder) / "disturbed")
            found = disturbed(run, arguments.kills, arguments.period, arguments.every, arguments.seed)
            known["kills"] = {"provenance": facts, **found}
            BASELINE.write_text(json.dumps(known, indent=2) + "\n")
            print(json.dumps(known["kills"], indent=2), flush=True)


if __name__ == "__main__":
    main()

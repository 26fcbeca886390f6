"""The report of a long run: seconds to make it, its bytes, and seconds until a browser has it on the screen.

``python benchmarks/report.py`` makes the folder of a run of 100,000 steps that was killed once and resized once, writes
its report in a process of its own, as ``distft report`` does, and opens that in headless Chromium. Limits: 20 s, 5 MB
and 2 s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from tests.unit.tiny_runs import run_of  # noqa: E402

SECONDS, BYTES, OPEN_SECONDS = 20.0, 5_000_000, 2.0


def measure(steps: int, opens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = run_of("language_modeling", Path(folder) / "long", steps=steps, kill=steps // 3, resize=2 * steps // 3)
        command = [sys.executable, "-m", "distft", "report", "long", "--runs", folder]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        seconds = time.perf_counter() - began
        return {
            "steps": steps,
            "metrics_bytes": run.metrics.stat().st_size,
            "seconds": round(seconds, 2),
            "bytes": run.report.stat().st_size,
            "open_seconds": [round(one, 3) for one in opened(run.report, opens)],
        }


def opened(page: Path, times: int) -> list[float]:
    """Seconds from the start of the navigation to the end of the page's load event, each in a new tab."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    found = []
    try:
        for _ in range(times):
            driver.switch_to.new_window("tab")
            driver.get(page.as_uri())
            entry = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            found.append(driver.execute_script(f"return {entry}") / 1000)
    finally:
        driver.quit()
    return found


def main() -> None:
    """Measures and writes ``benchmarks/baselines/report.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--opens", type=int, default=5)
    asked = parser.parse_args()
    result = {"provenance": provenance(("matplotlib", "jinja2")), **measure(asked.steps, asked.opens)}
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    (ROOT / "benchmarks" / "baselines" / "report.json").write_text(text, encoding="utf-8")
    if result["seconds"] > SECONDS or result["bytes"] > BYTES or max(result["open_seconds"]) > OPEN_SECONDS:
        raise SystemExit("beyond the limits")


if __name__ == "__main__":
    main()

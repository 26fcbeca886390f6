"""The last result of each long proof, kept in the repository: ``pytest -m slow --record`` writes it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# On a busy machine one example takes as long as it takes.
hypothesis.settings.register_profile("distft", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("distft")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "baselines" / "slow-tests.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help=f"bring {RESULTS.name} up to date with what slow tests say")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    told = report.when == "call" or report.failed
    if told and item.get_closest_marker("slow") and item.config.getoption("--record"):
        from benchmarks.provenance import provenance

        facts = provenance()
        seed = [line for line in report.capstdout.splitlines() if line.startswith("DISTFT_SEED=")]
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        known[item.nodeid] = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "said": report.capstdout.splitlines()[-3:],
            **{name: facts[name] for name in ("commit", "date", "load_average", "processor", "cores")},
            **({"seed": seed[-1].partition("=")[2]} if seed else {}),
        }
        text = json.dumps(dict(sorted(known.items())), indent=2, ensure_ascii=False)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    return report

"""Prometheus metrics: those of training, which never stop it, and the dashboard that shows them and serving's."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from distft.orchestrate.train.meters import COUNTERS, GAUGES, LABEL, RESTARTS, Meters
from distft.runs import Run, append_line
from distft.serving.metrics import Meters as ServingMeters
from tests.support import ROOT
from tests.unit.tiny_runs import training_lines

DASHBOARD = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
TRAINING = {
    f"ray_{name}" for name, _ in [RESTARTS, *COUNTERS.values(), *itertools.chain(*map(dict.values, GAUGES.values()))]
}


def serving() -> dict[str, set[str]]:
    """What a server tells: the names of series, each with its labels."""
    families = list(ServingMeters().registry.collect())
    meters = vars(ServingMeters())
    labels = {meter._name: set(meter._labelnames) for meter in meters.values() if hasattr(meter, "_labelnames")}
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {
        f"{family.name}{ending}": labels[family.name] | ({"le"} if ending == "_bucket" else set())
        for family in families
        for ending in endings[family.type]
    }


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_of_the_dashboard_names_metrics_and_labels_that_exist(expression: str) -> None:
    named = set(re.findall(r"\b(?:ray_)?distft_\w+", expression))
    served = serving()
    assert named
    assert named <= TRAINING | served.keys()
    labels = {label for listed in re.findall(r"by \(([^)]*)\)", expression) for label in listed.split(", ")}
    held = {LABEL} if named <= TRAINING else set.intersection(*(served[name] for name in named))
    assert labels <= held
    assert set(re.findall(r"\{(\w+)", expression)) <= held


def test_every_metric_of_training_is_on_the_dashboard() -> None:
    assert set(re.findall(r"\bray_distft_\w+", " ".join(EXPRESSIONS))) == TRAINING


def test_the_panels_of_the_dashboard_lie_beside_one_another() -> None:
    """Grafana's page is 24 columns wide; panels that lie upon one another it would push about."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= known | {"__all"}


def told(run: Run, lines: list[dict[str, Any]]) -> list[str]:
    notes: list[str] = []
    meters = Meters(run, notes.append)
    for line in lines:
        meters.record(line)
    return notes


def test_a_run_of_any_name_is_told(tmp_path: Path) -> None:
    """Ray's labels are ASCII."""
    assert told(Run(tmp_path / 'Größe 寸法 "x"'), training_lines(6, kill=3)) == []


def test_metrics_that_fail_are_told_once_and_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util.metrics import Gauge

    def gone(*_: Any) -> None:
        raise ConnectionError("the agent\nis gone")

    monkeypatch.setattr(Gauge, "set", gone)
    notes = told(Run(tmp_path / "sea"), training_lines(6))
    assert notes == ["  no metrics for Prometheus: the agent is gone; training goes on without them"]


def test_what_a_run_did_before_counts_for_its_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util.metrics import Gauge

    seen: dict[str, float] = {}
    monkeypatch.setattr(Gauge, "set", lambda self, value, tags: seen.update({self.info["name"]: value}))
    run, lines = Run(tmp_path / "sea"), training_lines(12, kill=4, resize=8)
    for line in lines:
        append_line(run.metrics, line)
    assert told(run, training_lines(6, kill=3)) == []
    assert seen[RESTARTS[0]] == 3
    assert seen["distft_train_steps"] == 6

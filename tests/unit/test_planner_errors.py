"""The planner's benchmark: what its errors are told from."""

from __future__ import annotations

import pytest

from benchmarks.planner import errors
from distft.plan.calibration import Observation


def observed(kind: str, bytes_off: float, seconds_off: float) -> Observation:
    return Observation(100.0, 100.0 * bytes_off, 10.0, 10.0 * seconds_off, kind)


def test_errors_are_told_plain_by_the_others_and_by_the_rounds_before() -> None:
    first = [observed("a", 1.0, 2.0), observed("b", 1.2, 1.0), observed("c", 1.2, 1.0)]
    second = [observed("a", 1.0, 1.6), observed("b", 1.2, 1.0), observed("c", 1.5, 1.25)]
    processes = [0.0, 0.0, 300.0]
    assert "memory_by_rounds_before" not in errors(first, processes, [])[0]
    one, _, last = errors(second, processes, first)
    assert one["memory"] == pytest.approx(0)
    assert one["seconds"] == pytest.approx(10 / 16 - 1)
    assert one["memory_by_others"] == pytest.approx(0.35)  # the median of 1.2 and 1.5
    assert one["seconds_by_others"] == pytest.approx(11.25 / 16 - 1)
    assert one["memory_by_rounds_before"] == pytest.approx(0)
    assert one["seconds_by_rounds_before"] == pytest.approx(20 / 16 - 1)
    assert last["memory"] == pytest.approx(400 / 450 - 1)  # the process is the same
    assert last["memory_by_rounds_before"] == pytest.approx(420 / 450 - 1)

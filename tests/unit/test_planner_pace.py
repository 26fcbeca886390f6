"""The planner's benchmark on a machine that is not as fast at one time as at another."""

from __future__ import annotations

import pytest

from benchmarks.planner import usual


def test_a_runs_pace_is_told_over_the_usual_one_of_as_many_workers() -> None:
    assert usual([2.0, 4.0, 3.0, 8.0, 4.0], [1, 1, 1, 2, 2]) == pytest.approx([2 / 3, 4 / 3, 1, 8 / 6, 4 / 6])

"""The arithmetic of the benchmarks of growth and of ZeRO's memory."""

from __future__ import annotations

import math

import pytest

from benchmarks.growth import allowed, slope
from benchmarks.zero_memory import SHAPE, as_table, planned
from distft.plan.memory import BUCKET

SIZES = [1_000, 10_000, 100_000]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_slope_is_the_power(power: float) -> None:
    assert slope({size: 3e-3 * size**power for size in SIZES}) == pytest.approx(power)


def test_n_log_n_is_allowed_and_more_is_not() -> None:
    limit = allowed(SIZES)
    assert slope({size: size * math.log(size) for size in SIZES}) < limit
    assert slope({size: size**1.25 for size in SIZES}) > limit


def test_the_formula_of_zero_and_the_planners_parts() -> None:
    """16 bytes a parameter, over the ranks at stage 3; the planner adds fp32 gradients and DeepSpeed's bucket."""
    parameters, _ = planned(0, 1, "bf16", 1)
    parameters //= 16
    assert parameters == pytest.approx(SHAPE["layers"] * 3.54e6 + SHAPE["vocabulary"] * SHAPE["hidden"], rel=0.01)
    for ranks in (1, 2, 4):
        formula, plan = planned(3, ranks, "bf16", 1)
        assert formula == pytest.approx(16 * parameters / ranks, rel=1e-6)
        assert plan == pytest.approx(18 * parameters / ranks + 2 * BUCKET["cpu"], rel=1e-6)
    sizes = {"held_bytes": 2_000_000, "formula_bytes": 1_000_000, "planned_bytes": 2_000_000}
    assert "| 3 | 2 |  | 2 | 1 | 2.00 | 2 | 1.00 |" in as_table([{"stage": 3, "ranks": 2, "hpz": 1, **sizes}])

"""The planner against published tables: within 20 %, or the row says why not."""

from __future__ import annotations

import pytest

from benchmarks.published import ROWS, SHAPES, Row, compare, table


@pytest.mark.parametrize("row", list(compare()), ids=lambda row: f"{row.published.what}-{row.published.devices}")
def test_predictions_are_within_a_fifth_or_say_why_not(row: Row) -> None:
    assert abs(row.error) <= 0.2 or row.published.reason


def test_growth_with_devices_is_within_a_tenth() -> None:
    grown = [row.scaled_error for row in compare() if row.scaled_error is not None]
    assert len(grown) == len(ROWS) - 4
    assert all(abs(error) <= 0.11 for error in grown)


def test_the_models_are_those_of_the_tables() -> None:
    assert SHAPES["MPT-7B"].parameters == pytest.approx(6_658_859_008, rel=1e-3)  # NumParams, with biases
    assert SHAPES["Llama 3.1 8B"].parameters == 8_030_261_248
    assert SHAPES["Llama 3 70B"].parameters == 70_553_706_496


def test_the_table_has_a_line_for_each_row() -> None:
    rows = list(compare())
    lines = table(rows).splitlines()[2:]
    assert all(f"| {row.published.devices} |" in line for row, line in zip(rows, lines, strict=False))

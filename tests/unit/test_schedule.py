"""The learning rate is a pure function of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.train.schedule import Kind, learning_rate

kinds = st.sampled_from(["cosine", "linear", "constant"])


@given(kind=kinds, total=st.integers(1, 300), warmup=st.floats(0, 1), data=st.data())
def test_it_rises_then_never_rises_again(kind: Kind, total: int, warmup: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, total))
    rate = learning_rate(step, total, 1e-3, kind, warmup)
    assert 0 < rate <= 1e-3
    if step > 1:
        before = learning_rate(step - 1, total, 1e-3, kind, warmup)
        assert rate > before if step <= round(warmup * total) else rate <= before


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_it_begins_at_the_peak_without_warmup_and_ends_near_zero(kind: Kind) -> None:
    assert learning_rate(1, 100, 3e-4, kind, 0.0) == 3e-4
    assert learning_rate(100, 100, 3e-4, kind, 0.0) < 3e-4 * 0.02


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    rates = [learning_rate(step, 100, 1.0, "cosine", 0.1) for step in range(1, 12)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9] == rates[10] == 1.0


def test_half_way_is_half_the_peak() -> None:
    assert learning_rate(51, 100, 1.0, "cosine", 0.0) == pytest.approx(0.5)
    assert learning_rate(51, 100, 1.0, "linear", 0.0) == pytest.approx(0.5)
    assert learning_rate(51, 100, 1.0, "constant", 0.0) == 1.0

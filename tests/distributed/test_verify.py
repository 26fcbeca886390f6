"""``verify`` over real processes: it holds where it should, and a planted fault is caught."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from distft.cli import main
from distft.orchestrate.proof.trial import Case, Trial, make_trial
from distft.orchestrate.proof.verify import BOUND, CASES, KILLED, RESUMED, prove
from distft.runs import training_curve
from tests.distributed import tiny

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trial(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_trial(tiny.job(made), made / "model", tmp_path_factory.mktemp("trial"))


def apart(trial: Trial, folder: Path) -> Trial:
    """The trial with runs of its own."""
    return dataclasses.replace(trial, runs=folder / "runs")


def test_every_pair_of_settings_stands_in_a_case() -> None:
    values = [dataclasses.astuple(case) for case in CASES]
    assert len({value[:2] for value in values}) == 12
    for one, other in itertools.combinations(range(4), 2):
        kinds = len({value[one] for value in values}) * len({value[other] for value in values})
        assert len({(value[one], value[other]) for value in values}) == kinds
    assert KILLED in CASES


def test_invariant_2_holds_on_a_sound_job_and_through_a_kill(trial: Trial, tmp_path: Path) -> None:
    mine = apart(trial, tmp_path)
    proof = prove(mine, [KILLED], [KILLED, Case(1, 0, 2, True)])
    assert not proof.problems
    _, resumed, elastic = proof.results
    assert resumed.same_digits
    assert elastic.same_digits is None
    assert max(max(result.loss, result.grad_norm) for result in proof.results) < BOUND
    curve = training_curve(mine.reference(True).metrics)
    assert len(curve) == 20
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.1  # it learns: the steps are not all alike


def mean_of_means() -> None:
    """Weighs each micro-batch alike, however many targets it has: the usual fault of gradient accumulation."""
    from distft.engine.zero import ZeroEngine
    from distft.plan.batch import BatchPlan

    divide, forward = BatchPlan.micro_batches, ZeroEngine.forward_backward
    count = 1

    def micro_batches(self: BatchPlan, indices: Any, rank: int) -> Any:
        nonlocal count
        count = math.ceil(len(indices) / self.micro_batch_size)
        return divide(self, indices, rank)

    def forward_backward(self: ZeroEngine, batch: Any, scale: float, **how: Any) -> Any:
        return forward(self, batch, 1 / (count * max(1, batch.supervised_tokens)), **how)

    BatchPlan.micro_batches = micro_batches  # type: ignore[method-assign]
    ZeroEngine.forward_backward = forward_backward  # type: ignore[method-assign]


def other_order() -> None:
    """Turns the rows of each step around, which its loss does not show."""
    from distft.data.order import Order

    step = Order.step
    Order.step = lambda self, number: step(self, number)[::-1]  # type: ignore[method-assign]


def test_a_planted_mean_of_means_is_caught(trial: Trial, tmp_path: Path) -> None:
    proof = prove(apart(trial, tmp_path), [Case(2, 1, 2, False)], [], plant=mean_of_means)
    assert proof.results[0].same_rows
    assert proof.results[0].grad_norm > 1e-3
    (loss, norm) = proof.problems
    assert loss.startswith("2 workers, ZeRO 1, micro-batch 2, not packed: invariant 2 (loss): the loss is off by")
    assert "the gradient norm is off by" in norm
    assert proof.as_json()["holds"] is False


def test_a_planted_other_order_is_caught(trial: Trial, tmp_path: Path) -> None:
    proof = prove(apart(trial, tmp_path), [Case(1, 0, 3, True)], [], plant=other_order)
    assert not proof.results[0].same_rows
    assert "invariant 1 (order): step 1: its rows are not the planned ones" in proof.problems[0]


@pytest.mark.slow
def test_the_whole_on_the_command_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    job = made / "job.yaml"
    with job.open("w") as file:
        YAML().dump(tiny.job(made).dump(), file)
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(job), "--json"])
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    found = json.loads(said.out)
    assert found["holds"]
    assert len(found["results"]) == len(CASES) + len(RESUMED)

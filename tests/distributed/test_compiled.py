"""Layers that are compiled train the same model: over two real ZeRO ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distft.errors import DistftError
from distft.runs import StopRequest, read_json
from distft.train.reporter import FileReporter, Record
from distft.world import World
from tests.distributed import tiny
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

SETTINGS = ["zero.stage=2", "train.micro_batch_size=4", "train.epochs=null", "train.steps=6"]
COMPILED = [*SETTINGS, "train.compile=true"]


class StopAfter(FileReporter):
    """Asks the run to stop once step 2 is reported."""

    def train(self, record: Record) -> None:
        super().train(record)
        if self._is_main and record["step"] == 2:
            self._run.ask(StopRequest("interrupt"))


def trainings(folder: str) -> list[int]:
    """Plain, compiled, and compiled but stopped after two steps; how many graphs torch has compiled after each."""
    from torch._dynamo.utils import counters

    home, is_main = Path(folder), World.from_environment().is_main
    graphs = []
    for name, settings in (("plain", SETTINGS), ("compiled", COMPILED), ("resumed", COMPILED)):
        stops = StopAfter(tiny.run_of(home, name), is_main=is_main) if name == "resumed" else None
        tiny.train(home, name, *settings, reporter=stops)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def resume(folder: str) -> str:
    """Goes on in processes that have compiled nothing yet; then what is said of ZeRO-3."""
    home = Path(folder)
    tiny.train(home, "resumed", *COMPILED, resume=True)
    try:
        tiny.train(home, "split", *COMPILED, "zero.stage=3")
    except DistftError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def home(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("compiled") / "home"))


def test_compiled_layers_train_the_same_model_and_the_same_digits_after_a_resume(home: Path) -> None:
    for plain, compiled, _ in run_ranks(trainings, 2, str(home)):
        assert plain == 0
        assert compiled > 0
    curves = {name: tiny.curve(home, name) for name in ("plain", "compiled")}
    for key in ("loss", "grad_norm"):
        found, expected = ([step[key] for step in curves[name]] for name in ("compiled", "plain"))
        assert found == pytest.approx(expected, rel=1e-5)
    assert read_json(tiny.run_of(home, "compiled").resolved)["decisions"]["train.compile"]["value"] is True
    tiny.run_of(home, "resumed").stop_request.unlink()
    for said in run_ranks(resume, 2, str(home)):
        assert "train.compile: ZeRO-3 gathers" in said
    assert [step["loss"] for step in tiny.curve(home, "resumed")] == [step["loss"] for step in curves["compiled"]]

"""Predicted beside measured: what a run leaves, and what the next one learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distft.errors import CapacityError, DistftError
from distft.model.shape import of_folder
from distft.orchestrate.cluster import Node
from distft.orchestrate.fit import hardware_of
from distft.plan import calibration
from distft.plan.choices import choose
from distft.plan.hardware import Hardware, host_memory_bytes
from distft.plan.speed import CPU_LINK, CPU_NETWORK, Links
from distft.runs import Run, append_line, read_json, read_lines
from distft.train.forecast import IMPORTED_LATER, Forecast, forecast, measure, settle
from distft.world import World
from tests.distributed import tiny
from tests.unit.test_plan_memory import LLAMA_8B

MACHINE = Hardware("cpu", "CPU", True, memory_bytes=10**12)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, module_cache: None) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny.make(folder)
    (folder / "cache").mkdir()
    return folder


def expected(
    home: Path, hardware: Hardware = MACHINE, world: World | None = None, links: Links | None = None
) -> Forecast:
    job, world = tiny.job(home), world or World()
    return forecast(
        job,
        LLAMA_8B,
        choose(job, world.size, hardware, shape=LLAMA_8B),
        world,
        hardware,
        1e12,
        process_bytes=500_000_000,
        labels=0,
        attended_tokens=50.0,
        fill=0.9,
        links=links,
    )


def train_lines(
    run: Run, seconds: list[float], *, memory: int, workers: int = 1, rows: int = 7, micro: int = 7
) -> None:
    for step, took in enumerate(seconds, start=1):
        line = {"kind": "train", "step": step, "step_seconds": took, "tokens_per_second": 100 / took, "rows": rows}
        shared = {"peak_memory_bytes": memory, "world_size": workers, "micro_batch_size": micro}
        append_line(run.metrics, {**line, **shared})


def test_a_run_leaves_what_was_predicted_and_measured(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    from distft.task.prepare import prepare
    from distft.train.worker import work

    job = tiny.job(home, "train.epochs=null", "train.steps=5")
    run = Run(tmp_path / "run")
    work(job, World(), run, prepare(job, home / "model"), home / "model", kind="plain")
    plan = read_json(run.plan)
    assert plan["measured"]["steps"] == 5
    assert plan["predicted"]["parameters"] == of_folder(home / "model").parameters
    for figure, error in plan["error"].items():
        assert error == pytest.approx(plan["predicted"][figure] / plan["measured"][figure] - 1)
    # The model takes 1 MB, and this process has imported already what a worker imports later.
    off = plan["predicted"]["peak_memory_bytes"] - plan["measured"]["peak_memory_bytes"]
    assert -100e6 < off < IMPORTED_LATER + 100e6
    assert not calibration.calibration_path().exists()


def test_freed_memory_is_given_back_once_after_the_first_step(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distft.task.prepare import prepare
    from distft.train.worker import work

    run, given_back_after = Run(tmp_path / "run"), []
    monkeypatch.setattr(
        "distft.train.loop.give_back_free_memory",
        lambda: given_back_after.append([*read_lines(run.metrics)][-1]["step"]),
    )
    job = tiny.job(home, "train.epochs=null", "train.steps=3")
    work(job, World(), run, prepare(job, home / "model"), home / "model", kind="plain")
    assert given_back_after == [1]


def test_a_run_corrects_the_next_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path))
    before, run = expected(home), Run(tmp_path / "run")
    estimate = before.estimate
    seconds = 2 * estimate.time.seconds
    memory = round(1.1 * estimate.device_bytes)
    train_lines(run, [9 * seconds, seconds, seconds, seconds], memory=memory)
    settle(run, before)
    assert read_json(run.plan)["error"]["step_seconds"] == pytest.approx(-0.5)
    after = expected(home).estimate
    assert after.step_seconds == pytest.approx(seconds)
    assert after.device_bytes == pytest.approx(memory, rel=1e-6)
    assert after.way == estimate.way
    assert after.correction.runs == 1


def test_the_network_that_was_measured_sets_the_time_of_sending(home: Path, tmp_path: Path) -> None:
    measured = [
        {"source": "a", "target": "b", "bytes_per_second": 12.5e6, "round_trip_seconds": 0.04},
        {"source": "b", "target": "a", "bytes_per_second": 50e6, "round_trip_seconds": 0.001},
    ]
    links = Links.of(measured)
    apart = World(0, 2, 0, 1)
    made = expected(home, world=apart, links=links)
    usual = expected(home, world=apart).estimate.time
    assert made.estimate.time.sending == pytest.approx(usual.sending * min(CPU_LINK, CPU_NETWORK) / 12.5e6, rel=0.01)
    assert made.estimate.time.compute == usual.compute
    train_lines(Run(tmp_path), [1.0] * 4, memory=10, workers=2, micro=made.estimate.setup.micro_batch_size)
    settle(Run(tmp_path), made, tmp_path / "calibration.json")
    said = read_json(Run(tmp_path).plan)["predicted"]["network"]
    assert said == {"bytes_per_second": 12.5e6, "round_trip_seconds": 0.04}
    together = expected(home, world=World(0, 2, 0, 2), links=links)  # on one node it means nothing
    assert together.links is None
    assert Links.of(()) is None


def test_too_few_steps_or_those_of_other_groups_tell_nothing(home: Path, tmp_path: Path) -> None:
    run, made = Run(tmp_path / "run"), expected(home)
    train_lines(run, [1.0, 1.0], memory=10)
    settle(run, made, tmp_path / "calibration.json")
    train_lines(run, [1.0] * 8, memory=10, workers=2)
    settle(run, made, tmp_path / "calibration.json")
    assert not run.plan.exists()


def test_first_and_short_steps_are_not_timed() -> None:
    line = {"tokens_per_second": 1.0, "peak_memory_bytes": 5, "rows": 8}
    lines = [{**line, "step_seconds": seconds} for seconds in (50.0, 2.0, 2.0)]
    assert measure([*lines, {**line, "rows": 1, "step_seconds": 0.1}])["step_seconds"] == 2.0


def test_devices_of_a_cluster_are_known_from_ray() -> None:
    def gpus(kind: str, name: str = "a") -> Node:
        return Node(name, {"CPU": 8, "GPU": 8, f"accelerator_type:{kind}": 1.0}, name)

    found = hardware_of([gpus("H100"), gpus("L4", "b")], {"GPU": 1}, "elsewhere")
    assert found is not None
    assert (found.name, found.memory_bytes) == ("L4", 24_000_000_000)
    assert hardware_of([gpus("TPU-V4")], {"GPU": 1}, "elsewhere") is None
    assert hardware_of([], {"CPU": 1}, "elsewhere") is None


def test_memory_of_a_cluster_is_that_of_its_smallest_node() -> None:
    large = Node("a", {"CPU": 4, "memory": 60e9, "object_store_memory": 20e9}, "a")
    small = Node("b", {"CPU": 4, "memory": 6e9, "object_store_memory": 2e9}, "b")
    found, here = hardware_of([large, small], {"CPU": 1}, "c"), hardware_of([small], {"CPU": 1}, "b")
    assert found is not None
    assert found.memory_bytes == 8_000_000_000
    assert here is not None
    assert here.memory_bytes == host_memory_bytes()
    assert hardware_of([Node("d", {"CPU": 4}, "d")], {"CPU": 1}, "c") is None


def test_a_worker_refuses_what_does_not_fit_before_it_loads_anything(home: Path) -> None:
    with pytest.raises(CapacityError) as refused:
        choose(tiny.job(home), 1, replace(MACHINE, memory_bytes=10**10), shape=LLAMA_8B)
    assert isinstance(refused.value, DistftError)
    assert refused.value.exit_status == 4

"""What training does when something happens: over two real ZeRO ranks."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from distft.checkpoint import Folder, complete, newest_sound, signing_key
from distft.errors import DistftError
from distft.runs import StopRequest, read_json, read_lines
from distft.train.reporter import FileReporter, Record
from distft.world import World
from tests.distributed import tiny
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

SETTINGS = [
    "zero.stage=2",
    "train.micro_batch_size=2",
    "train.epochs=null",
    "train.steps=12",
    "checkpoint.every={steps: 4}",
]


class StopAfter(FileReporter):
    """Asks the run to stop once step 5 is reported."""

    def train(self, record: Record) -> None:
        super().train(record)
        if self._is_main and record["step"] == 5:
            self._run.ask(StopRequest("interrupt"))


class FullAfter(FileReporter):
    """From step 5 on rank 1 can write no file of more than 20 kB: its shard is cut off as on a full disk."""

    def train(self, record: Record) -> None:
        super().train(record)
        if not self._is_main and record["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def attempt(home: Path, name: str, *settings: str, **how: Any) -> dict[str, Any]:
    """Trains; how it ended, as plain values."""
    try:
        outcome = tiny.train(home, name, *SETTINGS, *settings, **how)
    except DistftError as error:
        return {"error": type(error).__name__, "says": str(error), "status": error.exit_status}
    return {"step": outcome.step, "stopped": outcome.stopped, "best": outcome.best_step}


def happenings(folder: str) -> dict[str, Any]:
    """Everything that these tests look at, in one set of processes."""
    home, world = Path(folder), World.from_environment()
    found: dict[str, Any] = {"whole": attempt(home, "whole")}
    run = tiny.run_of(home, "stopped")
    found["stopped"] = attempt(home, "stopped", reporter=StopAfter(run, is_main=world.is_main))
    if world.is_main:
        run.stop_request.unlink()
        shutil.copytree(run.folder, home / "runs" / "damaged")
        spoil(home / "runs" / "damaged" / "checkpoints" / "step-000006")
    found["again"] = attempt(home, "stopped")
    found["other rate"] = attempt(home, "stopped", "train.learning_rate=0.002", resume=True)
    found["resumed"] = attempt(home, "stopped", resume=True)
    found["damaged"] = attempt(home, "damaged", resume=True)
    found["poisoned"] = attempt(home, "poisoned", "train.steps=17", "checkpoint.every={steps: 1}", model="poisoned")
    for policy in ("skip_batch", "rewind"):
        for stage in (0, 1, 2, 3):
            how = [
                "train.steps=17",
                "train.validate_every={steps: 17}",
                f"train.non_finite={policy}",
                f"zero.stage={stage}",
            ]
            found[f"{policy} {stage}"] = attempt(home, f"{policy}-{stage}", *how, model="poisoned")
    found["impatient"] = attempt(
        home, "impatient", "train.learning_rate=1.0", "train.validate_every={steps: 1}", "train.patience=2"
    )
    found["small budget"] = attempt(home, "small", "checkpoint.budget=1KB")
    full = FullAfter(tiny.run_of(home, "filled"), is_main=world.is_main)
    found["filled"] = attempt(home, "filled", reporter=full)
    found["full"] = attempt(home, "full")  # the limit stays
    return found


def spoil(folder: Path) -> None:
    """Changes one bit of a shard."""
    path = next(folder.glob("*/rank-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def home(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("training") / "home"))


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    first, second = run_ranks(happenings, 2, str(home))
    assert first == second  # every rank ends alike
    return dict(first)


def events(home: Path, name: str) -> list[str]:
    return [line["event"] for line in read_lines(tiny.run_of(home, name).metrics) if line["kind"] == "event"]


def kept(home: Path, name: str) -> list[int]:
    """The steps of a run's checkpoints, newest first."""
    run = tiny.run_of(home, name)
    storage = Folder(run.checkpoints)
    return [checkpoint.step for checkpoint in complete(storage, signing_key(run, storage))]


def losses(home: Path, name: str) -> list[float]:
    return [step["loss"] for step in tiny.curve(home, name)]


def test_a_run_tells_its_whole_story(found: dict[str, Any], home: Path) -> None:
    assert found["whole"] == {"step": 12, "stopped": None, "best": 12}
    run = tiny.run_of(home, "whole")
    lines = list(read_lines(run.metrics))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 12]
    happened = events(home, "whole")
    assert [event for event in happened if event != "checkpoint"] == ["start", "best", "best", "finished"]
    assert happened[1] == "checkpoint"  # of step 0, on trial
    assert kept(home, "whole") == [12, 10, 8, 4, 0]
    saved = [line for line in lines if line.get("event") == "checkpoint"]
    assert [line["step"] for line in saved] == [0, 4, 8, 10, 12]
    assert all(min(line["blocking_seconds"], line["write_seconds"], line["bytes"]) > 0 for line in saved)
    step = tiny.curve(home, "whole")[0]
    contract = (
        "kind time step epoch loss learning_rate grad_norm rows tokens supervised_tokens step_seconds "
        "tokens_per_second mfu peak_memory_bytes world_size micro_batch_size accumulation sample_digest"
    )
    assert set(contract.split()) <= set(step)
    assert len(step["rank_peak_memory_bytes"]) == 2
    assert max(step["rank_peak_memory_bytes"]) == step["peak_memory_bytes"]
    assert (step["world_size"], step["micro_batch_size"], step["accumulation"], step["rows"]) == (2, 2, 2, 7)
    decisions = read_json(run.resolved)["decisions"]
    assert decisions["zero.stage"] == {"value": 2, "reason": "set in the job"}


def test_asked_to_stop_it_checkpoints_and_goes_on_where_it_was(found: dict[str, Any], home: Path) -> None:
    assert found["stopped"] == {"step": 6, "stopped": "interrupt", "best": None}
    assert found["resumed"] == {"step": 12, "stopped": None, "best": 12}
    assert [event for event in events(home, "stopped") if event != "checkpoint"] == [
        "start", "interrupted", "resume", "best", "best", "finished",
    ]  # fmt: skip
    assert losses(home, "stopped") == losses(home, "whole")


def test_a_run_with_checkpoints_is_not_overwritten_nor_resumed_as_another(found: dict[str, Any]) -> None:
    assert found["again"]["error"] == "JobError"
    assert "--resume" in found["again"]["says"]
    assert found["other rate"]["error"] == "JobError"
    assert "train.learning_rate was 0.001, is 0.002" in found["other rate"]["says"]


def test_invariant_7_a_damaged_checkpoint_is_named_and_the_one_before_used(found: dict[str, Any], home: Path) -> None:
    assert found["damaged"]["step"] == 12
    (damaged,) = (line for line in read_lines(home / "runs/damaged/metrics.jsonl") if line.get("event") == "damaged")
    assert "step-000006" in damaged["reason"]
    assert "sha256" in damaged["reason"]
    assert losses(home, "damaged") == losses(home, "whole")
    assert kept(home, "damaged") == [12, 10, 8, 4, 0]


def test_a_loss_that_is_no_number_names_step_and_rows_and_keeps_the_last_good_checkpoint(
    found: dict[str, Any], home: Path
) -> None:
    ended = found["poisoned"]
    assert ended["error"] == "NonFiniteLoss"
    assert "corpus.jsonl:8" in ended["says"]
    run = tiny.run_of(home, "poisoned")
    steps = [step["step"] for step in tiny.curve(home, "poisoned")]
    assert f"step {len(steps) + 1}:" in ended["says"]
    assert steps
    sound, problems = newest_sound(storage := Folder(run.checkpoints), signing_key(run, storage))
    assert not problems
    assert sound is not None
    assert sound.step == steps[-1]


def test_patience_ends_a_run_that_gains_nothing(found: dict[str, Any], home: Path) -> None:
    assert found["impatient"]["step"] < 12
    assert events(home, "impatient")[-1] == "finished"
    assert found["impatient"]["step"] == found["impatient"]["best"] + 2


def test_a_budget_too_small_is_refused_before_the_first_step(found: dict[str, Any], home: Path) -> None:
    assert found["small budget"]["error"] == "CapacityError"
    assert "checkpoint.budget" in found["small budget"]["says"]
    assert losses(home, "small") == []


@pytest.mark.parametrize("policy", ["skip_batch", "rewind"])
def test_a_step_that_is_no_number_is_left_out_where_the_job_says_so(
    found: dict[str, Any], home: Path, policy: str
) -> None:
    """What it did to weights, moments and gradients is undone at every stage: the steps after it are equal."""
    before = losses(home, "poisoned")
    bad = len(before) + 1
    first = bad if policy == "skip_batch" else (bad - 1) // 4 * 4 + 1
    curves = {}
    for stage in range(4):
        name = f"{policy}-{stage}"
        assert found[f"{policy} {stage}"]["step"] == 17, found[f"{policy} {stage}"]
        curves[stage] = losses(home, name)
        assert [number for number, loss in enumerate(curves[stage], 1) if loss is None] == list(range(first, bad + 1))
        (told,) = (line for line in read_lines(tiny.run_of(home, name).metrics) if line.get("event") == "skipped")
        assert told["step"] == bad
        assert "corpus.jsonl:8" in told["reason"]
    assert curves[2][: first - 1] == before[: first - 1]
    for stage in (0, 1, 3):
        finite = [(one, other) for one, other in zip(curves[stage], curves[2], strict=True) if one is not None]
        assert all(one == pytest.approx(other, rel=1e-5) for one, other in finite)


def test_a_disk_that_fills_stops_no_training_but_the_end(found: dict[str, Any], home: Path) -> None:
    assert found["filled"]["error"] == "CapacityError"
    assert "rank 1" in found["filled"]["says"]
    assert len(losses(home, "filled")) == 12
    lines = list(read_lines(tiny.run_of(home, "filled").metrics))
    assert [line["step"] for line in lines if line.get("event") == "checkpoint_failed"] == [8, 10]
    assert kept(home, "filled")[0] == 4


def test_a_disk_too_small_is_found_before_the_first_step(found: dict[str, Any], home: Path) -> None:
    assert found["full"]["error"] == "CapacityError"
    assert "rank 1" in found["full"]["says"]
    assert losses(home, "full") == []
    assert not [path for path in tiny.run_of(home, "full").checkpoints.rglob("*") if path.is_file()]


def two_steps(folder: str) -> int:
    return tiny.train(Path(folder), "bare hands", *SETTINGS, "train.steps=2").step


def test_no_compiler_is_needed_on_a_cpu(home: Path, tmp_path: Path) -> None:
    """DeepSpeed would compile a collective that training never calls: see ``engine/zero.py``."""
    empty = tmp_path / "empty"
    empty.mkdir()
    built = tmp_path / "extensions"
    env = {"PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(built)}
    assert run_ranks(two_steps, 2, str(home), env=env) == [2, 2]
    assert not built.exists()

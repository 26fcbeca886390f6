"""Invariant 2 of the contract for every task and for adapters, and what a checkpoint beside an adapter holds."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from distft.checkpoint import Folder, complete, signing_key, weights
from distft.config import Job
from distft.data.store import Prepared
from distft.errors import JobError
from distft.runs import Run, read_lines
from distft.world import World
from tests.distributed import tiny
from tests.distributed.test_invariants import Gone, Until, furthest
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

TASKS: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification", "class_weights": "balanced"},
    "generation": {"kind": "generation", "prompt": "{text} is ", "response": "{label}"},
}
LORA = {"kind": "lora", "rank": 2, "alpha": 4, "rslora": True}
DORA = {"kind": "lora", "rank": 2, "alpha": 4, "dora": True, "dropout": 0.2}


@dataclass(frozen=True)
class Variant:
    """One run of the tiny model."""

    task: str
    packing: bool
    adapter: str
    ranks: int = 1
    stage: int = 0
    micro_batch: int = 7
    kind: str = "plain"
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in vars(self).values())

    def over(self, ranks: int, stage: int, micro_batch: int) -> Variant:
        return replace(self, ranks=ranks, stage=stage, micro_batch=micro_batch, kind="zero")

    def job(self, folder: Path, *settings: str) -> Job:
        adapter = {"full": None, "lora": LORA, "dora": DORA}[self.adapter]
        return tiny.job(
            folder,
            f"zero.stage={self.stage}",
            f"train.micro_batch_size={self.micro_batch}",
            f"cluster.workers={self.ranks}",
            f"data.packing={str(self.packing).lower()}",
            *settings,
            model={"source": "model", "dtype": self.dtype, "adapter": adapter},
            task=TASKS[self.task],
            data={"source": "rows.jsonl", "max_tokens": 96, "splits": {"validation": 0.1, "test": 0.1}},
            train={
                "steps": 20,
                "batch_size": 7,
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
                "validate_every": {"steps": 10},
            },
        )

    def train(self, folder: Path, name: str, *settings: str, **how: Any) -> None:
        from distft.train.worker import work

        world = World() if self.kind == "plain" else World.from_environment()
        job, prepared = self.job(folder, *settings), Path((folder / f"{self.task}-{self.packing}").read_text())
        work(job, world, tiny.run_of(folder, name), prepared, folder / "model", kind=self.kind, **how)  # type: ignore[arg-type]


REFERENCES = [
    Variant(task, packing, adapter) for task in TASKS for packing in (True, False) for adapter in ("full", "lora")
]
#: Ranks, ZeRO stage and micro-batch, for one reference after the other: an adapter meets every stage.
SPREAD = [
    ((1, 0, 2), (2, 3, 4)),
    ((2, 0, 1), (3, 1, 2)),
    ((2, 2, 1), (3, 3, 4)),
    ((3, 0, 1),),
]
SPLIT = [one.over(*place) for number, one in enumerate(REFERENCES) for place in SPREAD[(number + number // 4) % 4]]
REFERENCE_BF16 = Variant("classification", True, "lora", dtype="bf16")
SPLIT_BF16 = [REFERENCE_BF16.over(2, stage, 2) for stage in (1, 3)]
ALL = [*REFERENCES, *SPLIT, REFERENCE_BF16, *SPLIT_BF16]
SAME = [Variant("classification", True, "lora").over(2, 0, 2), Variant("generation", True, "dora").over(2, 3, 2)]
#: The same micro-batches, so that dropout is the same, in one process.
DROPPED = replace(SAME[1], ranks=1, stage=0, kind="plain")
SHORT = ["train.steps=8", "checkpoint.every={steps: 4}"]


def train_all(folder: str, ranks: int) -> None:
    """All runs on a number of ranks. Two ranks also train SAME, and again until they are killed in the last one."""
    home = Path(folder)
    for one in ALL:
        if one.ranks == ranks:
            one.train(home, one.name)
    if ranks == 1:
        DROPPED.train(home, DROPPED.name, *SHORT)
    if ranks == 2:
        for one in SAME:
            one.train(home, f"whole-{one.name}", *SHORT)
        for one in SAME:
            run, is_main = tiny.run_of(home, f"broken-{one.name}"), World.from_environment().is_main
            with pytest.raises(Gone):
                one.train(home, run.name, *SHORT, reporter=Until(run, is_main=is_main, kill=one == SAME[-1], step=6))


def resume_all(folder: str) -> None:
    first = SAME[0]
    with pytest.raises(JobError, match=r"model\.adapter\.rank was 2, is 3; task\.class_weights was balanced, is none"):
        first.train(
            Path(folder),
            f"broken-{first.name}",
            *SHORT,
            "model.adapter.rank=3",
            "task.class_weights=none",
            resume=True,
        )
    for one in SAME:
        one.train(Path(folder), f"broken-{one.name}", *SHORT, resume=True)


def write_rows(path: Path) -> None:
    """Texts of three labels, one of them rare, of 5 to 40 characters."""
    draw = random.Random(5)
    with path.open("w", encoding="utf-8") as file:
        for number in range(120):
            label = draw.choices(["peace", "roads", "schools"], weights=[5, 4, 1])[0]
            words = [label, *draw.choices(tiny.WORDS, k=draw.choice([0, 2, 5]))]
            draw.shuffle(words)
            file.write(json.dumps({"text": f"{number} {' '.join(words)}", "label": label}) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs: one set of processes per number of ranks, and one that resumes."""
    from distft.task.prepare import prepare

    folder = tmp_path_factory.mktemp("tasks")
    tiny.make_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE", str(folder / "cache"))
        for one in REFERENCES:
            prepared = prepare(one.job(folder), folder / "model")
            (folder / f"{one.task}-{one.packing}").write_text(str(prepared))
    for ranks in (1, 2, 3):
        run_ranks(train_all, ranks, str(folder), ranks, expect=-signal.SIGKILL if ranks == 2 else 0)
    run_ranks(resume_all, 2, str(folder))
    return folder


def prepared_of(trained: Path, one: Variant) -> Prepared:
    return Prepared.open(Path((trained / f"{one.task}-{one.packing}").read_text()))


def test_the_rows_are_what_they_should_be(trained: Path) -> None:
    packed, padded = (prepared_of(trained, Variant("classification", packing, "full")) for packing in (True, False))
    assert packed.labels == ("peace", "roads", "schools")
    assert max(len(row.segments) for row in packed.rows("train")) > 1
    assert {len(row.segments) for row in padded.rows("train")} == {1}
    for row in packed.rows("train"):
        assert sum(row.supervised) == len(row.segments)
    texts = prepared_of(trained, Variant("generation", True, "full")).rows("train")
    assert all(0 < sum(row.supervised) < len(row.supervised) - len(row.segments) for row in texts)


@pytest.mark.parametrize(
    "reference", [*REFERENCES, REFERENCE_BF16], ids=lambda one: f"{one.task}-{one.packing}-{one.adapter}-{one.dtype}"
)
def test_invariant_2_loss(trained: Path, reference: Variant) -> None:
    tolerance = {"fp32": 1e-5, "bf16": 1e-2}[reference.dtype]
    expected = tiny.curve(trained, reference.name)
    assert sum(step["loss"] for step in expected[10:]) < sum(step["loss"] for step in expected[:10])
    compared = [
        one for one in ALL if one.kind == "zero" and reference.over(one.ranks, one.stage, one.micro_batch) == one
    ]
    assert compared
    for one in compared:
        curve = tiny.curve(trained, one.name)
        assert [step["sample_digest"] for step in curve] == [step["sample_digest"] for step in expected]
        for column in ("loss", "grad_norm"):
            assert furthest(curve, expected, column) < tolerance, (one, column)
        found = validations(trained, one)
        assert found == [pytest.approx(values, rel=tolerance) for values in validations(trained, reference)]


def validations(trained: Path, one: Variant) -> list[dict[str, float]]:
    lines = [line for line in read_lines(tiny.run_of(trained, one.name).metrics) if line["kind"] == "validation"]
    quick = "accuracy" if one.task == "classification" else "perplexity"
    assert all(("accuracy" in line) + ("perplexity" in line) == 1 for line in lines)
    assert len(lines) == 2
    return [{"loss": line["loss"], quick: line[quick]} for line in lines]


@pytest.mark.parametrize("one", SAME, ids=lambda one: one.name)
def test_invariant_2_same_digits_after_a_kill(trained: Path, one: Variant) -> None:
    whole, resumed = (tiny.curve(trained, f"{kind}-{one.name}") for kind in ("whole", "broken"))
    assert len(whole) == len(resumed) == 8
    for column in ("loss", "grad_norm", "sample_digest", "learning_rate"):
        assert [step[column] for step in whole] == [step[column] for step in resumed], column
    events = [
        line["event"] for line in read_lines(tiny.run_of(trained, f"broken-{one.name}").metrics) if "event" in line
    ]
    assert "restart" in events


def test_dora_and_dropout_under_zero_3_are_those_of_one_process(trained: Path) -> None:
    plain, sharded = tiny.curve(trained, DROPPED.name), tiny.curve(trained, f"whole-{SAME[1].name}")
    for column in ("loss", "grad_norm"):
        assert [step[column] for step in sharded] == pytest.approx([step[column] for step in plain], rel=1e-5)


def newest(trained: Path, name: str) -> list[Path]:
    """The shards of a run's newest checkpoint."""
    run = Run(trained / "runs" / name)
    storage = Folder(run.checkpoints)
    with complete(storage, signing_key(run, storage))[0].shards() as files:
        return files


@pytest.mark.parametrize(
    "one", [one for one in ALL if one.kind == "zero" and one.adapter == "lora"], ids=lambda one: one.name
)
def test_a_checkpoint_beside_an_adapter_holds_nothing_frozen(trained: Path, one: Variant) -> None:
    import torch
    from safetensors.torch import load_file

    def raw(weight: torch.Tensor) -> bytes:
        return weight.float().contiguous().view(torch.uint8).numpy().tobytes()

    files = newest(trained, one.name)
    content = b"".join(path.read_bytes() for path in files)
    frozen = load_file(trained / "model/model.safetensors")
    assert len(frozen) == 20
    for name, weight in frozen.items():  # in whole, or in the shares of up to three ranks
        if not name.endswith("norm.weight"):  # all ones
            assert raw(weight.flatten()[:8]) not in content, name
            assert raw(weight.flatten()[-8:]) not in content, name
    found = weights(files)
    head = {"score.weight"} if one.task == "classification" else set()
    assert {name for name in found if "lora_" not in name} == head
    assert len(found) == 2 * 7 * 2 + len(head)  # two matrices, seven targets, two layers
    assert one.ranks > 1 or all(raw(weight) in content for weight in found.values())  # so a search would find them
    assert all(weight.any() for name, weight in found.items() if "lora_B" in name)  # it has learnt
    whole = newest(trained, Variant(one.task, one.packing, "full").name)
    assert len(content) < 0.5 * sum(path.stat().st_size for path in whole)


@pytest.mark.parametrize("task", TASKS)
def test_all_stages_end_with_the_same_weights(trained: Path, task: str) -> None:
    import torch

    for adapter in ("full", "lora"):
        reference = Variant(task, True, adapter)
        expected, *others = (
            weights(newest(trained, one.name))
            for one in ALL
            if one == reference or reference.over(one.ranks, one.stage, one.micro_batch) == one
        )
        assert len(others) >= 2
        for found in others:
            for name, weight in expected.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)

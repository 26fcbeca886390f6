"""A state taken at any number of ranks and any ZeRO stage goes on at any other as if nothing had been."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distft.world import World
from tests.distributed import tiny
from tests.support import run_ranks

pytestmark = pytest.mark.distributed

#: Updates before the state is taken, and in all.
TAKEN, STEPS = 4, 8
ROWS = 6
#: Variants of the model: type, adapter and the folder that it lies in. Those with dropout need equal micro-batches.
VARIANTS: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "full": ("fp32", None, "model"),
    "lora": ("fp32", {"kind": "lora", "rank": 2, "alpha": 4, "dora": True}, "model"),
    "bf16": ("bf16", None, "model"),
    "dropout": ("fp32", None, "dropout"),
}


@dataclass(frozen=True, order=True)
class Shape:
    """How a state is split."""

    ranks: int
    stage: int
    kind: str = "zero"
    hpz: int = 1
    sharing: int = 1

    @property
    def name(self) -> str:
        return "-".join(map(str, vars(self).values()))


PLAIN = Shape(1, 0, "plain")
NODES = Shape(4, 3, hpz=2)
SHARING = Shape(4, 2, sharing=2)
SHAPES = [PLAIN, *(Shape(ranks, stage) for ranks in (1, 2, 3) for stage in range(4)), NODES, SHARING]


@dataclass(frozen=True)
class Move:
    """A state that one shape left and another one takes up; without ``source`` a run from the start."""

    variant: str
    source: Shape | None
    target: Shape

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.source.name if self.source else 'start'}-to-{self.target.name}"


@dataclass
class Counted:
    """A reader of a state that counts what is read."""

    state: Any
    elements: int = 0
    largest: int = 0
    updates: int = field(init=False)

    def __post_init__(self) -> None:
        self.updates = self.state.updates

    def read(self, name: str, kind: str, start: int, stop: int) -> Any:
        self.elements += stop - start
        self.largest = max(self.largest, stop - start)
        return self.state.read(name, kind, start, stop)


def open_engine(home: Path, variant: str, shape: Shape) -> Any:
    from distft import engine as engines
    from distft.model import DTYPES, LossModel, training_model

    dtype, adapter, folder = VARIANTS[variant]
    job = tiny.job(home, model={"source": folder, "dtype": dtype, "adapter": adapter})
    model = LossModel(training_model(job, home / folder, DTYPES[dtype], [], 1))
    settings = engines.Settings(
        DTYPES[dtype],
        shape.stage,
        weight_decay=0.1,
        max_grad_norm=1.0,
        hpz_partition_size=shape.hpz,
        sequence_parallel_size=shape.sharing,
    )
    world = World() if shape.kind == "plain" else World.from_environment()
    return engines.open(model, settings, world, shape.kind)  # type: ignore[arg-type]


def train(engine: Any, sharing: int, steps: Iterable[int]) -> list[list[float]]:
    """Loss and gradient norm of each step; two rows a micro-batch, micro-batches dealt out in turn."""
    import numpy as np
    import torch

    from distft.model import Batch
    from distft.model.batch import IGNORED

    curve = []
    for step in steps:
        draw = np.random.default_rng(step)
        ids = torch.from_numpy(draw.integers(2, 256, (ROWS, 16)))
        labels = torch.cat([ids[:, 1:], torch.full((ROWS, 1), IGNORED)], dim=1)
        labels[0, : step + 3] = IGNORED
        tokens = int((labels != IGNORED).sum())
        positions = torch.arange(16).expand(ROWS, 16)
        groups = engine.world.size // sharing
        mine = range(engine.world.rank // sharing, ROWS // 2, groups)
        turns = math.ceil(ROWS // 2 / groups)
        total = 0.0
        for turn in range(turns):
            batch, number = Batch.empty(1), -1
            if turn < len(mine):
                number = mine[turn]
                rows = slice(2 * number, 2 * number + 2)
                batch = Batch(ids[rows], positions[rows], labels[rows])
            losses = engine.forward_backward(batch, 1 / tokens, last=turn == turns - 1, seed=97 * step + number)
            total += float(losses.sum())
        (loss,) = engine.sum_over_ranks([total / tokens])
        curve.append([loss, engine.step(3e-3)])
    return curve


def work(folder: str, moves: list[list[Any]]) -> dict[str, Any]:
    """Runs the moves whose target this process is a rank of; each one's curve and what was read for it."""
    from distft.checkpoint.shards import Shards, content

    home, results = Path(folder), {}
    for variant, source, target in moves:
        move = Move(variant, Shape(*source) if source else None, Shape(*target))
        engine, read = open_engine(home, variant, move.target), None
        sharing = move.target.sharing
        if move.source is None:
            states = home / "states" / f"{variant}-{move.target.name}"
            states.mkdir(parents=True, exist_ok=True)
            curve = train(engine, sharing, range(TAKEN))
            snapshot = engine.snapshot().hold()
            curve += train(engine, sharing, range(TAKEN, STEPS))  # beside which the snapshot must not change
            (states / f"{engine.world.rank}.safetensors").write_bytes(b"".join(content(snapshot)))
            assert snapshot.updates == TAKEN
        else:
            state = Counted(Shards(sorted((home / "states" / f"{variant}-{move.source.name}").iterdir())))
            engine.restore(state)
            curve = train(engine, sharing, range(TAKEN, STEPS))
            read = [state.elements, state.largest]
        results[move.name] = {"curve": curve, "read": read}
        engine.close()
    return results


def run(home: Path, moves: list[Move]) -> dict[str, list[dict[str, Any]]]:
    """Each move's results, by rank: one set of processes per number of ranks."""
    results: dict[str, list[dict[str, Any]]] = {}
    for ranks in sorted({move.target.ranks for move in moves}):
        given = [
            [move.variant, move.source and list(vars(move.source).values()), list(vars(move.target).values())]
            for move in moves
            if move.target.ranks == ranks
        ]
        for per_rank in run_ranks(work, ranks, str(home), given, timeout_seconds=900):
            for name, result in per_rank.items():
                results.setdefault(name, []).append(result)
    return results


def check(home: Path, moves: list[Move]) -> dict[str, list[dict[str, Any]]]:
    """Every move goes on as its source did: to the digit where the shape is the same. Each move's results, by rank."""
    starts = sorted(
        {Move(move.variant, None, move.source) for move in moves if move.source}, key=lambda move: move.name
    )
    undisturbed, moved = run(home, starts), run(home, moves)
    for move in moves:
        expected = undisturbed[Move(move.variant, None, move.source).name][0]["curve"][TAKEN:]
        for rank in moved[move.name]:
            if move.source == move.target:
                assert rank["curve"] == expected, move
            tolerance = 1e-2 if move.variant == "bf16" else 1e-5
            assert [step[0] for step in rank["curve"]] == pytest.approx([step[0] for step in expected], rel=tolerance)
    return moved


#: Every stage written by some and read by another, both ways between one, two and three ranks, each variant; and four
#: ranks of which two by two hold the weights once more, or share rows.
MOVES = [
    *(Move("full", Shape(2, stage), Shape(2, stage)) for stage in range(4)),
    Move("full", Shape(2, 3), Shape(1, 0)),
    Move("full", Shape(2, 3), Shape(1, 3)),
    Move("full", Shape(1, 0), Shape(3, 3)),
    Move("full", Shape(3, 2), Shape(2, 1)),
    Move("full", Shape(2, 0), Shape(3, 2)),
    Move("full", Shape(3, 2), PLAIN),
    Move("lora", Shape(2, 3), Shape(2, 3)),
    Move("lora", Shape(3, 3), Shape(2, 1)),
    Move("bf16", Shape(2, 1), Shape(2, 1)),
    Move("bf16", Shape(2, 2), Shape(1, 3)),
    Move("dropout", Shape(3, 1), Shape(2, 3)),
    *(Move(variant, NODES, NODES) for variant in ("full", "lora", "bf16")),
    Move("full", Shape(2, 2), NODES),
    Move("full", NODES, Shape(3, 1)),
    Move("full", SHARING, SHARING),
    Move("full", SHARING, Shape(1, 0)),
    Move("full", Shape(3, 2), SHARING),
]


def test_a_state_goes_on_at_another_number_of_ranks_and_another_stage(home: Path) -> None:
    moved = check(home, MOVES)
    for move in MOVES:
        if move.target.stage == 0:
            continue
        read = [rank["read"] for rank in moved[move.name]]
        whole = sum(elements for elements, _ in read)  # each rank its own share, which together are the model once
        assert all(elements <= math.ceil(whole / move.target.ranks) * 1.1 for elements, _ in read), move


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.timeout(3000)
def test_any_shape_to_any_shape(home: Path, variant: str) -> None:
    """Each to each for the plain model; for the others each shape is read by itself and by another one."""
    shapes = [shape for shape in SHAPES if variant != "dropout" or shape.sharing == 1]
    number = len(shapes)
    steps = range(number) if variant == "full" else (0, 5)
    check(home, [Move(variant, shapes[one], shapes[(one + step) % number]) for one in range(number) for step in steps])

"""What a rank's optimizer holds is held once."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.world import World
from tests.support import run_ranks

pytestmark = pytest.mark.distributed


def held_once(folder: str) -> list[bool]:
    """At ZeRO 1, 2 and 3: whether what the optimizer steps, after an update, lies in the memory of the weights."""
    import torch

    from distft import engine as engines
    from distft.engine.shares import holdings
    from distft.model import Batch, LossModel, load_model

    world, found = World.from_environment(), []
    for stage in (1, 2, 3):
        model = LossModel(load_model(Path(folder), torch.float32))
        settings = engines.Settings(stage=stage)
        engine = engines.open(model, settings, world)
        engine.forward_backward(Batch.empty(4), 1.0, last=True, seed=0)
        engine.step(1e-3)
        weights = (getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters())
        memory = {weight.untyped_storage().data_ptr() for weight in weights}
        owned = [one.owner for one in holdings(engine._engine, engine._trained, settings, world)]  # type: ignore[attr-defined]
        found.append(bool(owned) and all(owner.untyped_storage().data_ptr() in memory for owner in owned))
        engine.close()
    return found


def summed_in_place(folder: str) -> list[bool]:
    """At ZeRO 1 and 2 in fp32: whether what the last pass leaves is what the update takes, end to end."""
    import torch

    from distft import engine as engines
    from distft.model import Batch, LossModel, load_model

    world, found = World.from_environment(), []
    for stage in (1, 2):
        model = LossModel(load_model(Path(folder), torch.float32))
        engine = engines.open(model, engines.Settings(stage=stage), world)
        for last in (False, True):
            engine.forward_backward(Batch.empty(4), 1.0, last=last, seed=0)
        optimizer = engine._engine.optimizer  # type: ignore[attr-defined]
        sums = [optimizer.averaged_gradients[group].flat_partition for group in range(len(optimizer.bit16_groups))]
        taken = []
        optimizer.optimizer.register_step_pre_hook(
            lambda stepped, *_, taken=taken: taken.extend(group["params"][0].grad for group in stepped.param_groups)
        )
        engine.step(1e-3)
        places = {one.data_ptr() for one in sums}
        found.append({one.data_ptr() for one in taken if one is not None} == places and len(places) == len(sums))
        engine.close()
    return found


def held_by_nodes(folder: str) -> list[tuple[int, int]]:
    """Elements of the second partition that a rank holds: after a pass, after the update; without and with one."""
    import torch

    from distft import engine as engines
    from distft.model import Batch, LossModel, load_model

    world, found = World.from_environment(), []
    for size in (2, 1, 2):  # what one engine held is gone with it
        model = LossModel(load_model(Path(folder), torch.float32))
        engine = engines.open(model, engines.Settings(stage=3, hpz_partition_size=size), world)

        def held(model: LossModel = model) -> int:
            return sum(
                0 if parameter.ds_secondary_tensor is None else parameter.ds_secondary_tensor.numel()  # type: ignore[attr-defined]
                for parameter in model.parameters()
            )

        engine.forward_backward(Batch.empty(4), 1.0, last=True, seed=0)
        after_pass = held()
        engine.step(1e-3)
        found.append((after_pass, held()))
        engine.close()
    return found


def test_ranks_of_a_node_hold_the_weights_once_more(home: Path) -> None:
    for first, without, again in run_ranks(held_by_nodes, 4, str(home / "model")):
        assert first == again
        assert first[0] > 0
        assert first[1] == 0  # an update makes it stale
        assert without == [0, 0]


def test_fp32_gradients_are_summed_where_the_update_takes_them_from(home: Path) -> None:
    assert run_ranks(summed_in_place, 2, str(home / "model")) == [[True] * 2] * 2


def test_fp32_weights_are_held_once(home: Path) -> None:
    assert run_ranks(held_once, 2, str(home / "model")) == [[True] * 3] * 2

"""Where DeepSpeed keeps a rank's share of each trained parameter and of its optimizer state, stage by stage.

It reads DeepSpeed's attributes (0.19.8) and no files of its own making: DeepSpeed's checkpoints are pickles, bound to
the number of ranks and the stage that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distft.engine.pieces import Holding
from distft.engine.protocol import Settings
from distft.world import World

Trained = Mapping[str, tuple[nn.Parameter, tuple[int, ...]]]


def holdings(engine: Any, trained: Trained, settings: Settings, world: World) -> list[Holding]:
    """What this rank's optimizer holds; without ZeRO that is everything, on every rank.

    Args:
        engine: DeepSpeed's.
        trained: The trained parameters, and the shapes they have when they are whole, by their names in the model.
        settings: Stage and type.
        world: This rank's place.
    """
    if settings.stage == 3:
        return list(_stage_3(engine.optimizer, trained, world))
    if settings.stage > 0:
        return list(_stage_1_or_2(engine.optimizer, trained))
    owners: dict[int, torch.Tensor] = {id(parameter): parameter for parameter, _ in trained.values()}
    if settings.dtype == torch.bfloat16:
        owners = {id(weight): master for weight, master in _pairs(engine.optimizer)}
    return [
        Holding(name, shape, 0, parameter.numel(), owners[id(parameter)], 0)
        for name, (parameter, shape) in trained.items()
    ]


def _stage_1_or_2(optimizer: Any, trained: Trained) -> Iterator[Holding]:
    """A group's weights lie end to end, and each rank holds a run of that; in bf16 and stage 1 another class does."""
    for name, (parameter, shape) in trained.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            (owner,) = optimizer.param_groups[mapping.param_group_index]["params"]
            whole, held = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Holding(name, shape, whole.start, whole.numel, owner, held.start)


def _stage_3(optimizer: Any, trained: Trained, world: World) -> Iterator[Holding]:
    """Each parameter is split into equal runs, the last one padded; groups of runs lie end to end."""
    for name, (parameter, shape) in trained.items():
        group, offset, run = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = world.rank * run
        elements = min(run, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if elements > 0:
            yield Holding(name, shape, start, elements, optimizer.fp32_partitioned_groups_flat[group], offset)


def step_weights_in_place(optimizer: Any, settings: Settings, world: World) -> None:
    """Lets the optimizer of ZeRO 1 to 3 step fp32 weights where they lie, not copies of them (4 bytes for each).

    DeepSpeed means to at stage 3, but compares a device with its name there, so that it never does (0.19.8); remove
    when it shares them at all three.
    """
    if settings.stage == 3:
        weights, copies = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
    else:
        weights = [shares[world.rank] for shares in optimizer.parallel_partitioned_bit16_groups]
        copies = optimizer.single_partition_of_fp32_groups
    for weight, copy in zip(weights, copies, strict=True):
        copy.data = weight.data
    if settings.stage < 3:
        optimizer._link_all_hp_params()  # they are views of the copies


def sum_gradients_in_place(optimizer: Any) -> None:
    """Lets ZeRO 1 and 2 add each bucket of fp32 gradients to the rank's share of their sum, as it does in bf16.

    Otherwise each pass copies its gradients into a share of its own, and the update copies the sum once more. Remove
    when DeepSpeed has the one buffer where gradients are summed in the type that they come in, too (0.19.8 has not).
    """
    optimizer._use_compact_grad_partition_buffer = lambda group_index: True


def refresh(engine: Any, settings: Settings) -> None:
    """Makes the weights that passes compute with those that the optimizer holds, as after an update; collective."""
    optimizer = engine.optimizer
    if settings.stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer._post_step(set())
    elif settings.stage > 0:
        optimizer.update_lp_params()
    elif settings.dtype == torch.bfloat16:
        for weight, master in _pairs(optimizer):
            weight.data.copy_(master.data)


def _pairs(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each bf16 weight with its fp32 one, in DeepSpeed's optimizer for bf16 without ZeRO."""
    for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(weights, masters, strict=True)

"""The process group: Ray Train's where there is one, torchrun's, or a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distft.world import World

#: A rank's thread may wait so long for another's: for as long as writing to a slow storage takes.
_ASIDE = timedelta(hours=6)


def device_of(world: World) -> torch.device:
    """The device of this rank: its node's GPU of the same local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def join(world: World, device: torch.device) -> None:
    """Joins the process group of ``world`` unless this process is in one; needs MASTER_ADDR and MASTER_PORT.

    A world of one needs neither: its store is in memory.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)


def leave() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums each value over all ranks in fp64; the result is the same on all of them."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    sums: list[float] = total.tolist()
    return sums


def broadcast(value: Any, device: torch.device) -> Any:
    """Rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def aside() -> dist.ProcessGroup:
    """A group of all ranks for threads beside training, whose collectives must not meet those of training."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_ASIDE)
    return group

"""Training a model over ranks: ZeRO (DeepSpeed), and beside it a plain engine that is the reference."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch

from distft.engine.plain import PlainEngine
from distft.engine.processes import broadcast, device_of, join, leave
from distft.engine.protocol import KINDS, Engine, Settings, StateReader
from distft.engine.snapshot import Piece, Snapshot
from distft.errors import CapacityError
from distft.model import LossModel
from distft.world import World

__all__ = [
    "KINDS",
    "Engine",
    "Piece",
    "Settings",
    "Snapshot",
    "StateReader",
    "broadcast",
    "device_of",
    "has_compiler",
    "join",
    "leave",
    "missing_build_tools",
    "open",
    "preload",
]


def open(model: LossModel, settings: Settings, world: World, kind: Literal["zero", "plain"] = "zero") -> Engine:
    """Opens an engine on this rank; all ranks call it with equal models.

    Args:
        model: The whole model, on the CPU.
        settings: Stage, offload, type, decay and clipping.
        world: This rank's place; its process group is joined if it has not been.
        kind: ``plain`` is the one-process reference.

    Raises:
        CapacityError: DeepSpeed has something to compile and there is nothing to compile it with.
    """
    if kind == "plain":
        return PlainEngine(model, settings)
    missing = missing_build_tools(settings.offload)
    if missing is not None:
        raise CapacityError(missing, where="zero.offload", fix="install it, or set zero.offload: none")
    device = device_of(world)
    join(world, device)
    _prepare_deepspeed(world)
    from distft.engine.zero import ZeroEngine  # DeepSpeed's import takes seconds: only where it is used

    return ZeroEngine(model, settings, world, device)


def preload() -> None:
    """Imports DeepSpeed, which takes seconds: in a process that ranks are forked from."""
    _prepare_deepspeed(World())
    import distft.engine.zero  # noqa: F401


def missing_build_tools(offload: str) -> str | None:
    """What this machine lacks to compile the parts of DeepSpeed that such a job needs, or None.

    Only offloading from a GPU needs any: its AdamW for the CPU is C++ that DeepSpeed compiles at first use.
    """
    if offload == "none" or not torch.cuda.is_available():
        return None
    if not has_compiler():
        return "no C++ compiler: DeepSpeed compiles its AdamW for the CPU at first use"
    if shutil.which("ninja", path=_search_path()) is None:
        return "no ninja: DeepSpeed compiles its AdamW for the CPU with it"
    return None


def has_compiler() -> bool:
    """Whether there is a C++ compiler: CXX, else c++ or g++."""
    return shutil.which(os.environ.get("CXX", "c++")) is not None or shutil.which("g++") is not None


def _prepare_deepspeed(world: World) -> None:
    """What DeepSpeed reads from the environment when it is imported, starts or compiles."""
    os.environ["PATH"] = _search_path()
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def _search_path() -> str:
    """PATH, with the scripts of this Python first: ninja is a pip package, found in no activated environment either."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

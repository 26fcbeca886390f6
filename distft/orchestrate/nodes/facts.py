"""What a node says of itself; gathered in a process on it that imports neither torch nor Ray for it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from distft.train.environment import versions

#: Where Linux keeps memory that processes share: Ray's object store, and NCCL between GPUs of one node.
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Room:
    """How much there is of something that runs out.

    Attributes:
        kind: What.
        name: Which, for people: a disk is named by a folder on it.
        free_bytes: What is left.
        total_bytes: What there is at all.
    """

    kind: Literal["memory", "shared memory", "disk", "Ray's disk"]
    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Facts:
    """What a node says of itself.

    Attributes:
        host: Its name.
        versions: By package; Python's too, and a digest of distft's source, which tells checkouts apart.
        interface: The network interface that has the node's address, where gloo's ranks meet; None where none has it.
        nccl_interface: The one that NCCL's ranks use: what NCCL_SOCKET_IFNAME says, else the same; None without GPUs.
        rooms: Memory, shared memory and disks.
    """

    host: str
    versions: dict[str, str]
    interface: str | None
    nccl_interface: str | None
    rooms: tuple[Room, ...]


def gather(address: str, folders: Sequence[str], ray_folder: str) -> Facts:
    """Facts of the node that this process is on.

    Args:
        address: By which other nodes know it.
        folders: On whose disks room is wanted.
        ray_folder: Ray's temporary folder.
    """
    interface = interface_of(address)
    return Facts(
        socket.gethostname(),
        {"python": platform.python_version(), **versions(), "distft's source": source_digest()},
        interface,
        os.environ.get("NCCL_SOCKET_IFNAME", interface if shutil.which("nvidia-smi") else None),
        (
            *memory_rooms(),
            *(disk_room(folder) for folder in folders),
            replace(disk_room(ray_folder), kind="Ray's disk"),
        ),
    )


def memory_rooms() -> list[Room]:
    """Memory, and where there is such a thing, shared memory."""
    memory = psutil.virtual_memory()
    rooms = [Room("memory", "memory", memory.available, memory.total)]
    return [*rooms, replace(disk_room(SHARED_MEMORY), kind="shared memory")] if Path(SHARED_MEMORY).is_dir() else rooms


def disk_room(folder: str) -> Room:
    """What the disk has on which a folder is, or will be."""
    path = Path(folder).absolute()
    usage = shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists()))
    return Room("disk", folder, usage.free, usage.total)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    return None


@cache
def source_digest() -> str:
    """The first letters of a sha256 over the names and contents of distft's Python files, as they are on this disk."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]

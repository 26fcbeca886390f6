"""What a worker's device can do: detected facts, and the peak that MFU is measured against.

Nothing imports torch before it is needed: whether a job fits can be told without it.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from distft.plan.devices import Device, known

if TYPE_CHECKING:
    import torch


_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Hardware:
    """The device that a worker computes on.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        name: What the device calls itself.
        fast_bf16: Whether it multiplies bf16 matrices faster than fp32 ones.
        memory_bytes: Its memory; of a CPU the machine's, which the workers on it share. None: unknown.
        host_bytes: The memory of the machine that it is in. None: unknown.
        cores: Logical cores of a CPU that this process may use. None: unknown.
        wide: Whether a CPU computes with 512 bits at a time (AVX-512).
    """

    device_type: str
    name: str
    fast_bf16: bool
    memory_bytes: int | None = None
    host_bytes: int | None = None
    cores: int | None = None
    wide: bool = False

    @classmethod
    def detect(cls) -> Hardware:
        """Reads the facts of this process's current device."""
        import torch

        host = host_memory_bytes()
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            return cls("cuda", torch.cuda.get_device_name(), fast, total, host)
        return cls._cpu(f"CPU ({torch.backends.cpu.get_cpu_capability()})", host)

    @classmethod
    def glance(cls) -> Hardware:
        """The same facts of this machine without torch, in some milliseconds; a CPU has a shorter name."""
        host = host_memory_bytes()
        gpu = _first_gpu()
        if gpu is not None:
            name, total = gpu
            return cls("cuda", name, True, total, host)
        return cls._cpu("CPU", host)

    @classmethod
    def _cpu(cls, name: str, memory_bytes: int) -> Hardware:
        core, cores = _first_core(), len(os.sched_getaffinity(0))
        wide = "avx512f" in core.get("flags", "").split()
        return cls("cpu", name, _fast_bf16(core), memory_bytes, memory_bytes, cores, wide)

    def at_once(self, threads: int) -> float:
        """Workers of so many threads that its cores compute for at the same time, one at least; each has a GPU."""
        return max(1.0, self.cores / threads) if self.device_type == "cpu" and self.cores else math.inf

    @classmethod
    def of(cls, device: Device) -> Hardware:
        """A device of the table, in a machine that nothing is known of."""
        return cls("cuda", device.name, True, device.memory_bytes)


def processor() -> str:
    """Its name, and which of the instructions it has that decide how fast it trains: ``AMD EPYC (avx2, avx512f)``."""
    told = _first_core()
    has = [name for name in _INSTRUCTIONS if name in told.get("flags", "").split()]
    return told.get("model name", platform.processor()) + (f" ({', '.join(has)})" if has else "")


def _first_core() -> dict[str, str]:
    """What Linux says of the first core, which stands for all; other architectures name other things."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        return {}
    lines = (line.partition(":") for line in facts.read_text(errors="replace").partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _fast_bf16(core: Mapping[str, str]) -> bool:
    """Whether a core multiplies bf16 matrices faster than fp32 ones, by its instructions.

    With matrix tiles (AMX) it does, and AMD's do with AVX-512's products of pairs: at twice fp32's rate, measured on an
    EPYC. On Intel's those are slower than fp32: 0.6 of its rate on a Xeon whose tiles a virtual machine hides, and
    training's steps took 1.5 times as long (benchmarks/baselines/step-profile-xeon-*.json).
    """
    flags = core.get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and core.get("vendor_id") != "GenuineIntel")


def host_memory_bytes() -> int:
    """This machine's memory, or that of the container that this process is in, where that has less."""
    total = psutil.virtual_memory().total
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # another version of cgroups; or "max": no limit
            continue
    return total


def has_rdma() -> bool:
    """Whether this machine has InfiniBand, RoCE or EFA, over which NCCL sends faster than TCP does."""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def _first_gpu() -> tuple[str, int] | None:
    """Name and bytes of the first NVIDIA GPU that the driver tells of, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        name, mebibytes = next(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
        return name, int(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, StopIteration, ValueError):
        return None


#: Products that a rate is the best of, at least: on a busy machine one alone may be ten times too slow.
LEAST_TRIES = 5


@dataclass(frozen=True)
class Peak:
    """The floating point operations a second that a device can reach at best.

    Attributes:
        flops: Operations a second.
        name: Where the figure comes from.
    """

    flops: float
    name: str


def peak_flops(hardware: Hardware, dtype: torch.dtype) -> Peak:
    """The peak of a device for a type: from the table of GPUs, else measured with a large matrix product (0.2 s).

    A CPU's is that of this process's threads.
    """
    import torch

    device = known(hardware.name) if hardware.device_type == "cuda" and dtype == torch.bfloat16 else None
    if device is not None:
        return Peak(device.bf16_flops, f"{device.name}, dense bf16")
    return Peak(_measured_flops(hardware.device_type, dtype), f"{hardware.name}, measured matrix product")


def share_of_peak(hardware: Hardware, dtype: torch.dtype, workers: int, threads: int) -> float:
    """Operations a second that each of the workers on this machine's CPU has of what their threads reach together.

    They compute at the same time, as many as the cores have room for; what more of them take is counted in a step
    (:class:`distft.plan.speed.Rates`).
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(workers * threads, hardware.cores or before))
    try:
        return peak_flops(hardware, dtype).flops / min(workers, hardware.at_once(threads))
    finally:
        torch.set_num_threads(before)


def _measured_flops(device_type: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product within a short time, after a first one, which makes kernels."""
    import torch

    size = 4096 if device_type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device_type)
    torch.mm(matrix, matrix)
    best, tries = 0.0, 0
    end = time.perf_counter() + seconds
    while tries < LEAST_TRIES or time.perf_counter() < end:
        tries += 1
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device_type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best

"""What a worker's device can do: detected facts, and the peak that MFU is measured against."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """The device that a worker computes on.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        name: What the device calls itself.
        fast_bf16: Whether it multiplies bf16 matrices in hardware.
    """

    device_type: str
    name: str
    fast_bf16: bool

    @classmethod
    def detect(cls) -> Hardware:
        """Reads the facts of this process's current device."""
        if torch.cuda.is_available():
            return cls("cuda", torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False))
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls("cpu", f"CPU ({torch.backends.cpu.get_cpu_capability()})", fast)


@dataclass(frozen=True)
class Peak:
    """The floating point operations a second that a device can reach at best.

    Attributes:
        flops: Operations a second.
        name: Where the figure comes from.
    """

    flops: float
    name: str


#: Dense bf16 peaks of GPUs from NVIDIA's data sheets (without sparsity), by a part of their name; first match counts.
BF16_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(hardware: Hardware, dtype: torch.dtype) -> Peak:
    """The peak of a device for a type: from the table of GPUs, else measured with a large matrix product (0.2 s)."""
    if hardware.device_type == "cuda" and dtype == torch.bfloat16:
        for part, flops in BF16_PEAKS.items():
            if part in hardware.name:
                return Peak(flops, f"{part}, dense bf16")
    return Peak(_measured_flops(hardware.device_type, dtype), f"{hardware.name}, measured matrix product")


def _measured_flops(device_type: str, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product within a short time."""
    size = 4096 if device_type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device_type)
    best = 0.0
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device_type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best

"""What devices can do: their makers' figures, for planning without one.

Peaks are dense (no sparsity). Links count one direction, for one device: between devices of a node, and between nodes
on the machines that clouds and makers sell with them. None of it is measured here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from distft.errors import JobError


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: What people call it.
        marks: Parts of what drivers and Ray call it, all of which must be there.
        bf16_flops: Operations a second of dense bf16 matrix products.
        fp32_flops: The same in fp32, as torch multiplies unless told otherwise: without TF32.
        memory_bytes: Its memory.
        memory_bandwidth: Bytes a second between memory and processor.
        link: Bytes a second to the other devices of its node, one direction.
        network: Bytes a second to other nodes, this device's share of the node's network.
        source: Where the figures come from.
        per_node: Devices in a node.
    """

    name: str
    marks: tuple[str, ...]
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link: float
    network: float
    source: str
    per_node: int = 8


def _device(
    name: str,
    *marks: str,
    tflops: float,
    fp32_tflops: float,
    gigabytes: float,
    bandwidth: float,
    link: float,
    network: float,
    source: str,
) -> Device:
    """From the units of data sheets: TFLOP/s, GB, GB/s."""
    flops = tflops * 1e12, fp32_tflops * 1e12
    return Device(name, marks, *flops, int(gigabytes * 1e9), bandwidth * 1e9, link * 1e9, network * 1e9, source)


_PCIE4, _PCIE5 = 32, 64  # GB/s of 16 lanes, one direction
_IB_NDR, _IB_HDR = 50, 25  # 400 and 200 Gbit/s, an adapter for each device

#: The first whose marks are all in a device's name is it, so that special names come before those that they contain.
DEVICES = (
    _device(
        "B200",
        "B200",
        tflops=2250,
        fp32_tflops=75,
        gigabytes=180,
        bandwidth=7700,
        link=900,
        network=_IB_NDR,
        source="NVIDIA HGX B200 data sheet 2025; NVLink 5; DGX B200: 400 Gbit/s for each GPU",
    ),
    _device(
        "GH200",
        "GH200",
        tflops=989,
        fp32_tflops=67,
        gigabytes=96,
        bandwidth=4000,
        link=450,
        network=_IB_NDR,
        source="NVIDIA GH200 data sheet 2023",
    ),
    _device(
        "H200",
        "H200",
        tflops=989,
        fp32_tflops=67,
        gigabytes=141,
        bandwidth=4800,
        link=450,
        network=_IB_NDR,
        source="NVIDIA H200 data sheet 2024; NVLink 4; DGX H200: 400 Gbit/s for each GPU",
    ),
    _device(
        "H100-PCIe",
        "H100",
        "PCIE",
        tflops=756,
        fp32_tflops=51,
        gigabytes=80,
        bandwidth=2000,
        link=_PCIE5,
        network=_IB_HDR,
        source="NVIDIA H100 data sheet 2023, PCIe",
    ),
    _device(
        "H100",
        "H100",
        tflops=989,
        fp32_tflops=67,
        gigabytes=80,
        bandwidth=3350,
        link=450,
        network=_IB_NDR,
        source="NVIDIA H100 data sheet 2023, SXM; NVLink 4; DGX H100: 400 Gbit/s for each GPU",
    ),
    _device(
        "A100-40GB",
        "A100",
        "40G",
        tflops=312,
        fp32_tflops=19.5,
        gigabytes=40,
        bandwidth=1555,
        link=300,
        network=_IB_HDR,
        source="NVIDIA A100 data sheet 2021, SXM; NVLink 3; DGX A100: 200 Gbit/s for each GPU",
    ),
    _device(
        "A100",
        "A100",
        tflops=312,
        fp32_tflops=19.5,
        gigabytes=80,
        bandwidth=2039,
        link=300,
        network=_IB_HDR,
        source="NVIDIA A100 data sheet 2021, SXM, 80 GB; NVLink 3; DGX A100: 200 Gbit/s for each GPU",
    ),
    _device(
        "MI300X",
        "MI300X",
        tflops=1307,
        fp32_tflops=163.4,
        gigabytes=192,
        bandwidth=5300,
        link=448,
        network=_IB_NDR,
        source="AMD Instinct MI300X data sheet 2023; 7 Infinity Fabric links of 64 GB/s",
    ),
    _device(
        "L40S",
        "L40S",
        tflops=362,
        fp32_tflops=91.6,
        gigabytes=48,
        bandwidth=864,
        link=_PCIE4,
        network=6.25,
        source="NVIDIA L40S data sheet 2023; PCIe 4; AWS g6e.48xlarge: 400 Gbit/s for 8",
    ),
    _device(
        "L40",
        "L40",
        tflops=181,
        fp32_tflops=90.5,
        gigabytes=48,
        bandwidth=864,
        link=_PCIE4,
        network=6.25,
        source="NVIDIA L40 data sheet 2022; PCIe 4",
    ),
    _device(
        "L4",
        "L4",
        tflops=121,
        fp32_tflops=30.3,
        gigabytes=24,
        bandwidth=300,
        link=_PCIE4,
        network=1.56,
        source="NVIDIA L4 data sheet 2023; PCIe 4; AWS g6.48xlarge: 100 Gbit/s for 8",
    ),
    _device(
        "A40",
        "A40",
        tflops=150,
        fp32_tflops=37.4,
        gigabytes=48,
        bandwidth=696,
        link=_PCIE4,
        network=6.25,
        source="NVIDIA A40 data sheet 2021",
    ),
    _device(
        "A10G",
        "A10G",
        tflops=70,
        fp32_tflops=31.5,
        gigabytes=24,
        bandwidth=600,
        link=_PCIE4,
        network=1.56,
        source="NVIDIA A10G data sheet 2021; PCIe 4; AWS g5.48xlarge: 100 Gbit/s for 8",
    ),
    _device(
        "A10",
        "A10",
        tflops=125,
        fp32_tflops=31.2,
        gigabytes=24,
        bandwidth=600,
        link=_PCIE4,
        network=1.56,
        source="NVIDIA A10 data sheet 2021",
    ),
    _device(
        "RTX 4090",
        "RTX4090",
        tflops=165,
        fp32_tflops=82.6,
        gigabytes=24,
        bandwidth=1008,
        link=_PCIE4,
        network=1.25,
        source="NVIDIA Ada GPU architecture white paper 2022",
    ),
)


def known(name: str) -> Device | None:
    """The device that a driver, Ray or a person calls so; None where the table has none."""
    plain = re.sub(r"[^A-Z0-9]", "", name.upper())
    return next((device for device in DEVICES if all(mark in plain for mark in device.marks)), None)


def named(name: str) -> Device:
    """The device that a person names.

    Raises:
        JobError: The table has none of that name.
    """
    device = known(name)
    if device is None:
        names = ", ".join(one.name for one in DEVICES)
        raise JobError(f"no device {name!r} is known", where="--device", fix=f"one of: {names}")
    return device

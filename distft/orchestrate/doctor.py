"""What this machine and its cluster can do, each thing tried: ``distft doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from distft.config.values import amount
from distft.errors import DistftError
from distft.orchestrate.cluster import Node, connected, joined
from distft.orchestrate.listener import Listener
from distft.orchestrate.nodes import network as tcp
from distft.orchestrate.nodes.facts import disk_room, interface_of, memory_rooms
from distft.orchestrate.nodes.findings import Finding, describe, judge, of_room
from distft.orchestrate.nodes.network import Network
from distft.runs import read_json
from distft.train.environment import environment, versions
from distft.world import cache_folder

#: What is written to a folder and read again to try it.
TRIAL_BYTES = 8 << 20
#: Numbers that the two processes add up: 4 MB.
SUMMED = 500_000
#: The port that ``distft serve`` listens at unless it is told otherwise.
SERVE_PORT = 8000


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        findings: In the order in which things were looked at.
        network: Between the cluster's nodes.
    """

    findings: tuple[Finding, ...]
    network: Network | None = None

    @property
    def well(self) -> bool:
        """Whether nothing is in the way."""
        return all(finding.level != "problem" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "well": self.well,
            "findings": [asdict(finding) for finding in self.findings],
            "network": [] if self.network is None else [asdict(link) for link in self.network.links],
        }


def examine(runs: Path, *, address: str | None, listener: Listener) -> Examination:
    """Tries what this machine can do, then what the cluster can.

    Args:
        runs: Where runs are kept.
        address: The cluster, which must be there; None: the running one or, as for a run, one started here.
        listener: Who is told what is being tried.
    """
    parts: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("installation", _installation),
        ("device", _device),
        ("memory and disks", lambda: _rooms(runs)),
        ("network", _ports),
        ("two processes", _collective),
    )
    found: list[Finding] = []
    for name, part in parts:
        listener.stage(name)
        found += part()
    listener.stage("cluster")
    in_cluster, network = _cluster(runs, address)
    return Examination((*found, *in_cluster), network)


def _installation() -> Iterator[Finding]:
    """Whether what distft requires is installed, in versions that it works with; and which extras are."""
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield Finding("fine", "versions", f"Python {platform.python_version()}, {told}")
    wanted = [Requirement(line) for line in importlib.metadata.requires("distft") or []]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        if (lack := _lack(one)) is not None:
            fix = f"{Path(sys.executable).name} -m pip install '{one.name}{one.specifier}'"
            yield Finding("problem", "versions", lack, fix=fix)
    for extra in importlib.metadata.metadata("distft").get_all("Provides-Extra") or []:
        own = [one for one in wanted if one not in needed and one.marker and one.marker.evaluate({"extra": extra})]
        lacks = [lack for one in own if (lack := _lack(one)) is not None]
        how = f"not installed ({'; '.join(lacks)}): pip install 'distft[{extra}]'" if lacks else "installed"
        yield Finding("fine", "extras", f"{extra}: {how}")


def _lack(wanted: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted.name} is missing"
    if wanted.specifier.contains(version, prereleases=True):
        return None
    return f"{wanted.name} {version} is installed, and {wanted.specifier} is wanted"


def _device() -> Iterator[Finding]:
    """What the device is, what it is fast at, and what there is to compile with."""
    import torch

    from distft.engine import missing_build_tools
    from distft.model import DTYPES
    from distft.plan.choices import choose_dtype
    from distft.plan.hardware import Hardware, peak_flops

    hardware = Hardware.detect()
    chosen = choose_dtype("auto", hardware)
    gpus = torch.cuda.device_count() if hardware.device_type == "cuda" else 0
    name = f"{gpus} x {hardware.name}" if gpus else f"{environment()['cores']} cores, {hardware.name}"
    yield Finding("fine", "device", name)
    if not gpus and Path("/dev/nvidia0").exists():
        text = f"there is an NVIDIA GPU, and torch {torch.__version__} cannot use it"
        yield Finding("problem", "device", text, fix="install the driver, and a CUDA build of torch that fits it")
    peak = peak_flops(hardware, DTYPES[chosen.value])
    told = f"auto is {chosen.value}: {chosen.reason}; {peak.flops / 1e12:.2f} TFLOP/s ({peak.name})"
    yield Finding("fine", "dtype", told)
    lacking = missing_build_tools("cpu")
    if lacking is not None:
        fix = "install g++ and ninja, or keep zero.offload: none"
        yield Finding("note", "compiler", f"{lacking}, where a job has zero.offload: cpu", fix=fix)
    elif gpus:
        yield _compiled()
    else:
        yield Finding("fine", "compiler", "none is needed: only offloading from a GPU compiles something")


def _compiled() -> Finding:
    """Whether the C++ compiler makes a program that runs."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/program"
        command = [compiler, "-x", "c++", "-", "-o", program]
        try:
            subprocess.run(command, input=b"int main() { return 0; }", capture_output=True, check=True, timeout=60)
            subprocess.run([program], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            fix = "install g++ with its libraries, or keep zero.offload: none"
            return Finding("note", "compiler", f"{compiler} compiles nothing: {error}", fix=fix)
    return Finding("fine", "compiler", f"{compiler} and ninja, for zero.offload: cpu")


def _rooms(runs: Path) -> Iterator[Finding]:
    """Memory, and the folders that runs and what is fetched lie in: written to, read again, and room left."""
    for room in memory_rooms():
        enough = Finding("fine", "memory", f"{room.name}: {amount(room.free_bytes)} of {amount(room.total_bytes)} free")
        yield next(of_room(room), enough)
    for folder, setting in ((runs.absolute(), "--runs or DISTFT_RUNS"), (cache_folder().absolute(), "DISTFT_CACHE")):
        yield _written(folder, setting)
        yield from of_room(disk_room(str(folder)))


def _written(folder: Path, setting: str) -> Finding:
    """Whether a folder can be written to: a file, flushed to the disk, is read again."""
    content, began = os.urandom(TRIAL_BYTES), time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".distft-doctor-") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
            same = Path(file.name).read_bytes() == content
    except OSError as error:
        text = f"{folder} cannot be written to: {error.strerror}"
        return Finding("problem", "disk", text, fix=f"set {setting} to a folder that can")
    if not same:
        return Finding("problem", "disk", f"{folder} gives back other bytes than were written", fix="replace the disk")
    free = amount(disk_room(str(folder)).free_bytes)
    return Finding("fine", "disk", f"{folder}: {amount(round(TRIAL_BYTES / seconds))}/s written, {free} free")


def _ports() -> Iterator[Finding]:
    """A real connection to this machine's own address; and whether serving's port is free."""
    import ray

    address, token = ray.util.get_node_ip_address(), secrets.token_bytes(16)
    try:
        connection = tcp.Connection(address, tcp.Listener(token).port, token)
        trip = connection.round_trip_seconds()
        told = f"{amount(round(connection.bytes_per_second()))}/s, {trip * 1000:.2g} ms there and back"
        where = interface_of(address)
        yield Finding("fine", "port", f"this machine is {address}{f' ({where})' if where else ''}; TCP to it: {told}")
    except OSError as error:
        fix = f"let processes of this machine reach {address}: its firewall, or its address"
        yield Finding("problem", "port", f"no TCP connection to this machine's own address {address}: {error}", fix=fix)
    try:
        socket.create_server(("127.0.0.1", SERVE_PORT)).close()
        yield Finding("fine", "port", f"{SERVE_PORT} is free, for distft serve")
    except OSError as error:
        fix = "distft serve --port takes another one"
        yield Finding("note", "port", f"{SERVE_PORT}, distft serve's own: {error.strerror}", fix=fix)


def _collective() -> Iterator[Finding]:
    """Two processes of this machine that add numbers up over gloo, as the ranks of a run on CPUs do."""
    import ray

    from distft.orchestrate.proof.ranks import run_ranks

    interface = interface_of(ray.util.get_node_ip_address())
    place = f"at {interface}" if interface else "at the address of the host's name"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            run_ranks(_sum_up, 2, (interface, folder / "sum.json"), folder, lambda: None, preload=[__name__])
        except DistftError as error:
            text = f"two processes cannot work together over gloo {place}: {error.what} ({error.fix})"
            yield Finding("problem", "collective", text, fix="GLOO_SOCKET_IFNAME names an interface that they can use")
            return
        seconds = read_json(folder / "sum.json")
    told = f"{amount(SUMMED * 8)} summed in {seconds * 1000:.0f} ms"
    yield Finding("fine", "collective", f"two processes over gloo {place}: {told}")


def _sum_up(interface: str | None, said: Path) -> None:
    """One of the two."""
    import torch

    from distft.engine.processes import join, leave, sum_over_ranks
    from distft.runs import write_json
    from distft.world import World

    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    world, cpu = World.from_environment(), torch.device("cpu")
    join(world, cpu)
    sum_over_ranks([0.0], cpu)  # the processes meet
    began = time.perf_counter()
    total = sum_over_ranks([float(world.rank + 1)] * SUMMED, cpu)
    seconds = time.perf_counter() - began
    if total != [3.0] * SUMMED:
        raise RuntimeError(f"1 + 2 = {total[0]}")
    if world.is_main:
        write_json(said, seconds)
    leave()


def _cluster(runs: Path, address: str | None) -> tuple[list[Finding], Network | None]:
    """Ray, and each node of the cluster."""
    from distft.orchestrate.nodes.survey import survey

    began = time.monotonic()
    places = {str(runs.absolute()): "--runs or DISTFT_RUNS", str(cache_folder().absolute()): "DISTFT_CACHE"}
    try:
        with connected(address or "auto", start=address is None) as nodes:
            here = f"started here in {time.monotonic() - began:.1f} s, as for a run"
            found = [Finding("fine", "Ray", joined() or here)]
            heard = survey(nodes, places, anew=True)
    except DistftError as error:
        return [Finding("problem", "Ray", error.what, error.where or "", error.fix or "")], None
    found += [_of_node(node, heard.devices) for node in nodes]
    if len(nodes) > 1:
        found.append(Finding("fine", "network", describe(heard.reports, heard.network)))
    return [*found, *judge(heard.driver, heard.reports)], heard.network


def _of_node(node: Node, devices: Mapping[str, tuple[str, bool]]) -> Finding:
    """A node's resources and device."""
    amounts = [f"{node.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
    if node.name in devices:
        name, fast = devices[node.name]
        amounts.append(f"{name}, {'fast at' if fast else 'without'} bf16")
    return replace(Finding("fine", "node", ", ".join(amounts)), where=node.name)

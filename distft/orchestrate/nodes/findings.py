"""What is wrong with a cluster, and how to mend it: judged from what its nodes say. Pure; knows no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from distft.config.values import amount
from distft.orchestrate.nodes.facts import Facts, Room
from distft.orchestrate.nodes.network import Network

#: ``fine``; ``note``: a person should know it; ``problem``: it will not work.
Level = Literal["fine", "note", "problem"]

#: Clocks that differ by more make the times in logs misleading; by more than a cloud's notice of 30 s before it takes a
#: node away, workers would not keep to it.
CLOCK_NOTE_SECONDS, CLOCK_PROBLEM_SECONDS = 1.0, 30.0
#: Room on a disk. Ray makes no more objects on one that is 95 % full (RAY_local_fs_capacity_threshold).
DISK_NOTE_BYTES, DISK_PROBLEM_BYTES, RAY_DISK_FULL = 5 * 10**9, 200 * 10**6, 0.95
MEMORY_NOTE_BYTES = 10**9
#: Containers have 64 MB of shared memory unless they are given more; Ray's object store and NCCL live in it.
SHARED_NOTE_BYTES = 500 * 10**6


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: How it stands.
        topic: What was looked at, in a word.
        text: What was found.
        where: The node that it concerns; empty: this machine, or all of them.
        fix: What to do about it; empty where nothing is to be done.
    """

    level: Level
    topic: str
    text: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n    {self.fix}" if self.fix else ""
        return f"{place}{self.text}{advice}"


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a place that every node must see, as one node has it.

    Attributes:
        address: The place.
        setting: What says that it is there.
        text: What is wrong with it.
    """

    address: str
    setting: str
    text: str


@dataclass(frozen=True)
class Report:
    """What was heard of a node.

    Attributes:
        node: Its address.
        error: Why it could not be asked; nothing else is known then.
        facts: What it says of itself.
        troubles: With places that it must see.
        clock_seconds: By how much its clock is ahead of the driver's.
        clock_error_seconds: How much that may be wrong: half of the shortest round trip.
        unreached: Addresses that it could not measure its connection to, each with the reason.
    """

    node: str
    error: str | None = None
    facts: Facts | None = None
    troubles: tuple[Trouble, ...] = ()
    clock_seconds: float = 0.0
    clock_error_seconds: float = 0.0
    unreached: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """``10.0.0.2 (host2)``."""
        return self.node if self.facts is None else f"{self.node} ({self.facts.host})"


def judge(driver: Facts, reports: Sequence[Report]) -> list[Finding]:
    """What is wrong or worth a note, node by node; what is fine is left out.

    Args:
        driver: What the driver says of itself: others must have its versions.
        reports: The nodes.
    """
    return [finding for report in reports for finding in _of_node(driver, report)]


def _of_node(driver: Facts, report: Report) -> Iterator[Finding]:
    if report.facts is None:
        yield Finding(
            "problem",
            "node",
            f"cannot be asked: {report.error}",
            report.name,
            "see that distft is installed there with the driver's versions, and that Ray still runs; "
            "or take the node out of the cluster (ray stop there)",
        )
        return
    yield from _versions(driver, report.facts, report.name)
    for trouble in report.troubles:
        fix = f"mount the driver's folder there under the same path, or set {trouble.setting} to one that all nodes see"
        if "://" in trouble.address:
            fix = "give the node the bucket's credentials, in the environment of `ray start`"
        yield Finding("problem", "storage", f"{trouble.text}: {trouble.address}", report.name, fix)
    yield from _clock(report)
    for address, why in report.unreached:
        yield Finding(
            "problem",
            "network",
            f"does not reach {address}: {why}",
            report.name,
            f"open TCP between the nodes, all ports, in both directions; {address} must be an address of that node "
            "(ray start --node-ip-address)",
        )
    for room in report.facts.rooms:
        yield from of_room(room, report.name)


def _versions(driver: Facts, node: Facts, where: str) -> Iterator[Finding]:
    names = sorted({*driver.versions, *node.versions})
    ours = {name: _public(driver.versions.get(name)) for name in names}
    theirs = {name: _public(node.versions.get(name)) for name in names}
    other = [name for name in names if ours[name] != theirs[name]]
    if not other:
        return
    told = "; ".join(f"{name} {theirs[name]}, the driver has {ours[name]}" for name in other)
    fix = "install the same versions on every node: one image, or one constraints.txt"
    if other == ["distft's source"]:
        fix = "bring distft's folder there to the driver's state: the same commit and the same changes"
    yield Finding("problem", "versions", f"other versions: {told}", where, fix)


def _public(version: str | None) -> str:
    """Without what tells builds of a version apart: ``2.13.0+cpu`` trains with ``2.13.0+cu130``."""
    return "none" if version is None else version.partition("+")[0]


def _clock(report: Report) -> Iterator[Finding]:
    surely = abs(report.clock_seconds) - report.clock_error_seconds
    if surely <= CLOCK_NOTE_SECONDS:
        return
    level: Level = "problem" if surely > CLOCK_PROBLEM_SECONDS else "note"
    way = "ahead of" if report.clock_seconds > 0 else "behind"
    text = f"its clock is {abs(report.clock_seconds):.1f} s {way} the driver's"
    yield Finding(level, "clock", text, report.name, "set the clocks by the network: chrony or systemd-timesyncd")


def of_room(room: Room, where: str = "") -> Iterator[Finding]:
    """Whether there is enough of something; nothing where there is."""
    there = f"{amount(room.free_bytes)} of {amount(room.total_bytes)}"
    if room.kind == "memory":
        if room.free_bytes < MEMORY_NOTE_BYTES:
            yield Finding("note", "memory", f"{there} memory are free", where, "end what else runs there")
    elif room.kind == "shared memory":
        if room.total_bytes < SHARED_NOTE_BYTES:
            text = f"{room.name} holds {amount(room.total_bytes)}; Ray and NCCL share memory there"
            yield Finding("note", "memory", text, where, "give the container more: docker run --shm-size=8g")
    else:
        ray = room.kind == "Ray's disk"
        full = ray and room.free_bytes < (1 - RAY_DISK_FULL) * room.total_bytes
        if full or room.free_bytes < DISK_NOTE_BYTES:
            level: Level = "problem" if room.free_bytes < DISK_PROBLEM_BYTES else "note"
            fix = "free some, or start Ray with --temp-dir on a larger disk" if ray else "free some"
            yield Finding(level, "disk", f"{there} are free on the disk of {room.name}", where, fix)


def describe(reports: Sequence[Report], network: Network | None) -> str:
    """The cluster in a line: how fast its nodes reach one another, and where they meet."""
    parts = [f"{len(reports)} node{'' if len(reports) == 1 else 's'}"]
    if network is not None and network.links:
        trip = network.round_trip_seconds * 1000
        parts.append(f"{amount(round(network.bytes_per_second))}/s and {trip:.2g} ms there and back between them")
    if meeting := interfaces(reports):
        parts.append(meeting)
    return "; ".join(parts)


def interfaces(reports: Sequence[Report]) -> str:
    """Which interfaces gloo's ranks meet at, and NCCL's, where there are GPUs."""
    facts = [report.facts for report in reports if report.facts is not None]
    gloo = sorted({one.interface or "the address of the host's name" for one in facts})
    nccl = sorted({one.nccl_interface for one in facts if one.nccl_interface})
    told = [f"gloo at {', '.join(gloo)}"] if gloo else []
    return ", ".join([*told, *([f"NCCL at {', '.join(nccl)}"] if nccl else [])])

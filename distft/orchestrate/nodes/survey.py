"""Asks the nodes of the connected cluster, all at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from secrets import token_hex
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distft.errors import CapacityError, DistftError
from distft.orchestrate.cluster import Node, live_nodes
from distft.orchestrate.nodes.facts import Facts, gather
from distft.orchestrate.nodes.findings import Report, Trouble
from distft.orchestrate.nodes.network import Link, Network, network_file
from distft.orchestrate.nodes.probe import Probe
from distft.orchestrate.nodes.shared import DRIVER, Shared, reason_of

#: How long a node may take to start a process and answer. One that is gone is known to be within a minute, see
#: :mod:`distft.orchestrate.cluster`, and then not waited for.
START_SECONDS = 90.0
#: How long it may take for each question after that.
ANSWER_SECONDS = 45.0
#: How often a clock is read; the quickest answer counts.
CLOCK_READINGS = 4


@dataclass(frozen=True)
class Survey:
    """What was heard.

    Attributes:
        driver: What the driver's own process says.
        reports: One for each node.
        network: Between the nodes; None where there are not two, or one does not reach another.
        devices: By node, where they were asked for: what the device calls itself, and whether it is fast at bf16.
    """

    driver: Facts
    reports: tuple[Report, ...]
    network: Network | None
    devices: Mapping[str, tuple[str, bool]]

    def as_json(self) -> dict[str, Any]:
        """Nodes and links, for ``environment.json``."""
        return {
            "nodes": [
                {
                    "node": report.node,
                    "host": report.facts.host,
                    "interface": report.facts.interface,
                    "versions": report.facts.versions,
                    "clock_seconds": round(report.clock_seconds, 4),
                    "rooms": [asdict(room) for room in report.facts.rooms],
                }
                for report in self.reports
                if report.facts is not None
            ],
            "network": [] if self.network is None else [asdict(link) for link in self.network.links],
        }


def survey(nodes: Sequence[Node], places: Mapping[str, str], *, anew: bool = False) -> Survey:
    """Asks nodes about themselves, what they see of ``places``, their clocks, and how they reach one another.

    Args:
        nodes: Which; those that are gone by now are left out.
        places: Folders and buckets that all must see, each with what sets it.
        anew: Measure the network even where it is known; and ask for the nodes' devices.

    Raises:
        CapacityError: The driver itself cannot write to one of the places.
    """
    token = token_hex(16)
    looks = [Shared(address, setting, token) for address, setting in places.items()]
    _write(looks)
    with _probes(nodes, token) as probes:
        try:
            return _Asking(nodes, probes, looks).survey(anew=anew)
        finally:
            for look in looks:
                look.clear()


def _write(looks: Sequence[Shared]) -> None:
    for look in looks:
        try:
            look.write(DRIVER)
        except (OSError, DistftError) as error:
            why = reason_of(error) if isinstance(error, OSError) else error.what
            raise CapacityError(
                f"the driver cannot write there: {why}", where=look.address, fix=f"set {look.setting} to another place"
            ) from error


@contextlib.contextmanager
def _probes(nodes: Sequence[Node], token: str) -> Iterator[dict[str, Any]]:
    """A process on each node, by the node's id; ended at the end."""
    remote = ray.remote(num_cpus=0, max_restarts=0)(Probe)
    made = {}
    try:
        for node in nodes:
            pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
            made[node.id] = remote.options(scheduling_strategy=pinned).remote(node.name, token)
        yield made
    finally:
        for actor in made.values():
            ray.kill(actor)


@dataclass
class _Failed:
    """A question that a node did not answer, and why."""

    why: str


#: By the ids of nodes, the addresses that each does not reach, and why.
_Unreached = dict[str, tuple[tuple[str, str], ...]]


class _Asking:
    """The questions, one after the other; each is asked of all nodes at once. Nodes go by their ids.

    Args:
        nodes: The nodes.
        probes: The process on each of them.
        looks: What all must see.
    """

    def __init__(self, nodes: Sequence[Node], probes: Mapping[str, Any], looks: Sequence[Shared]) -> None:
        self._names = {node.id: node.name for node in nodes}
        self._probes = probes
        self._looks = looks
        self._folders = [look.address for look in looks if "://" not in look.address]

    def survey(self, *, anew: bool) -> Survey:
        """See :func:`survey`."""
        here = ray._private.worker.global_worker.node
        driver = gather(here.node_ip_address, self._folders, here.get_temp_dir_path())
        answers = self._ask("look", {node: (self._folders, self._looks, node) for node in self._names}, START_SECONDS)
        living = {node.id for node in live_nodes()}
        answers = {node: answer for node, answer in answers.items() if node in living}
        reports = {node: self._report(node, answer) for node, answer in answers.items()}
        sound = [node for node, report in reports.items() if report.error is None]
        network, unreached = self._network(sound, anew=anew)
        for node, failures in unreached.items():
            reports[node] = replace(reports[node], unreached=failures)
        return Survey(driver, tuple(reports.values()), network, self._devices(sound) if anew else {})

    def _report(self, node: str, answer: Any) -> Report:
        if isinstance(answer, _Failed):
            return Report(self._names[node], error=answer.why)
        facts, found = answer
        troubles = []
        for look, text in zip(self._looks, found, strict=True):
            told = text
            if text is None and not look.sees(node):
                told = "the driver does not see what it writes there"
                self._ask("clear", {node: ([look],)})
            if told is not None:
                troubles.append(Trouble(look.address, look.setting, told))
        try:
            clock = self._clock(node)
        except ray.exceptions.RayError as error:
            return Report(self._names[node], error=_told(error))
        return Report(self._names[node], None, facts, tuple(troubles), *clock)

    def _clock(self, node: str) -> tuple[float, float]:
        """By how much a node's clock is ahead of ours, and how wrong that may be (Cristian's algorithm)."""
        readings = []
        for _ in range(CLOCK_READINGS):
            began = time.time()
            there = ray.get(self._probes[node].now.remote(), timeout=ANSWER_SECONDS)
            ended = time.time()
            readings.append(((ended - began) / 2, there - (began + ended) / 2))
        error, ahead = min(readings)
        return ahead, error

    def _network(self, nodes: Sequence[str], *, anew: bool) -> tuple[Network | None, _Unreached]:
        """Between these nodes, measured if it is not known; and which do not reach which."""
        if len(nodes) < 2:
            return None, {}
        known = None if anew else Network.known(network_file(), nodes)
        if known is not None:
            return known, {}
        links, unreached = self._measure(nodes)
        if unreached:
            return None, unreached
        network = Network(tuple(sorted(nodes)), links)
        network.keep(network_file())
        return network, {}

    def _measure(self, nodes: Sequence[str]) -> tuple[tuple[Link, ...], _Unreached]:
        """From each node to the next, all at once, as a ring of ranks does it."""
        following = dict(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
        ports = self._ask("listen", dict.fromkeys(nodes, ()))
        targets = {node: other for node, other in following.items() if not isinstance(ports[other], _Failed)}
        trips = self._ask("connect", {node: (self._names[other], ports[other]) for node, other in targets.items()})
        rates = self._ask("send", {node: () for node, trip in trips.items() if not isinstance(trip, _Failed)})
        links: list[Link] = []
        unreached: _Unreached = {}
        for node, other in following.items():
            source, target = self._names[node], self._names[other]
            failed = [one for one in (ports[other], trips.get(node), rates.get(node)) if isinstance(one, _Failed)]
            if failed:
                unreached[node] = ((target, failed[0].why),)
            else:
                links.append(Link(source, target, rates[node], trips[node]))
        return tuple(links), unreached

    def _devices(self, nodes: Sequence[str]) -> dict[str, tuple[str, bool]]:
        answers = self._ask("device", dict.fromkeys(nodes, ()))
        return {self._names[node]: answer for node, answer in answers.items() if not isinstance(answer, _Failed)}

    def _ask(
        self, method: str, questions: Mapping[str, Sequence[Any]], seconds: float = ANSWER_SECONDS
    ) -> dict[str, Any]:
        """Each node's answer, or how it failed; a node that goes meanwhile is not waited for.

        Args:
            method: Of :class:`.probe.Probe`.
            questions: Its arguments, for each node that is asked.
            seconds: How long is waited at most.
        """
        asked = {node: getattr(self._probes[node], method).remote(*words) for node, words in questions.items()}
        end, waiting = time.monotonic() + seconds, dict(asked)
        while waiting and time.monotonic() < end:
            done, _ = ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=1)
            waiting = {node: ref for node, ref in waiting.items() if ref not in done}
            if waiting:
                living = {node.id for node in live_nodes()}
                waiting = {node: ref for node, ref in waiting.items() if node in living}
        return {node: _answer(ref, seconds) for node, ref in asked.items()}


def _answer(ref: Any, seconds: float) -> Any:
    try:
        return ray.get(ref, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return _Failed(f"no answer within {seconds:.0f} s")
    except ray.exceptions.RayError as error:
        return _Failed(_told(error))


def _told(error: BaseException) -> str:
    """The last line of what Ray says, which names the cause."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__

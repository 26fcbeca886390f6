"""The network between two nodes, measured with one TCP connection as gloo's ranks have: round trip and rate.

A connection of Python's reaches a few GB/s; faster networks are faster than what is found.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distft.runs import read_json, write_json
from distft.world import cache_folder

#: Round trips of a byte, of which the median counts.
ROUNDS = 11
#: For how long bytes are sent, and how many at most: enough for TCP to get up to speed where a round trip is long.
SEND_SECONDS, SEND_BYTES, CHUNK_BYTES = 0.7, 64 << 20, 256 << 10
#: How long a peer is waited for, at each turn.
WAIT_SECONDS = 15.0


@dataclass(frozen=True)
class Link:
    """What one node's connection to another one does.

    Attributes:
        source: The address that sends.
        target: The address that receives.
        bytes_per_second: What arrives, while every node sends to the next one.
        round_trip_seconds: Of one byte there and back.
    """

    source: str
    target: str
    bytes_per_second: float
    round_trip_seconds: float


@dataclass(frozen=True)
class Network:
    """Links from each node to the next, in a ring, as ring collectives use them.

    Attributes:
        nodes: Ray's ids of the nodes, sorted: what was measured is no other cluster's.
        links: One from each of them.
    """

    nodes: tuple[str, ...]
    links: tuple[Link, ...]

    @property
    def bytes_per_second(self) -> float:
        """Of the slowest link, which sets the pace of a ring."""
        return min(link.bytes_per_second for link in self.links)

    @property
    def round_trip_seconds(self) -> float:
        """Of the longest link."""
        return max(link.round_trip_seconds for link in self.links)

    @classmethod
    def known(cls, file: Path, nodes: Iterable[str]) -> Network | None:
        """What was measured between these very nodes, where the file has it."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            value = read_json(file)
            if value["nodes"] == sorted(nodes):
                return cls(tuple(value["nodes"]), tuple(Link(**link) for link in value["links"]))
        return None

    def keep(self, file: Path) -> None:
        """Writes it down, for :meth:`known`."""
        write_json(file, asdict(self))


def network_file() -> Path:
    """Where the network that was measured last is kept: :meth:`Network.known` reads it, and ``distft plan``."""
    return cache_folder() / "network.json"


class Listener:
    """Waits, in a thread, for the one peer that knows the token, and answers it; at every address, as Ray does.

    Args:
        token: What the peer begins with.
    """

    def __init__(self, token: bytes) -> None:
        self._server = socket.create_server(("", 0))
        self._token = token
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._server:
            self._server.settimeout(WAIT_SECONDS)
            while True:
                peer, _ = self._server.accept()
                with peer:
                    _set_up(peer)
                    if _read(peer, len(self._token)) == self._token:
                        return self._answer(peer)

    def _answer(self, peer: socket.socket) -> None:
        for _ in range(ROUNDS):
            peer.sendall(_read(peer, 1))
        samples, total = [], 0
        while received := peer.recv(CHUNK_BYTES):
            total += len(received)
            samples.append((time.perf_counter(), total))
        peer.sendall(json.dumps(rate(samples)).encode())


class Connection:
    """A connection to another node's :class:`Listener`.

    Args:
        address: Its address.
        port: Its port.
        token: Its token.

    Raises:
        OSError: It cannot be reached.
    """

    def __init__(self, address: str, port: int, token: bytes) -> None:
        self._socket = socket.create_connection((address, port), WAIT_SECONDS)
        _set_up(self._socket)
        self._socket.sendall(token)

    def round_trip_seconds(self) -> float:
        """The median time of a byte there and back; to be asked once, before the rate."""
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            self._socket.sendall(b"?")
            _read(self._socket, 1)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def bytes_per_second(self) -> float:
        """What arrives there of what is sent; ends the connection."""
        with self._socket:
            chunk, sent, end = bytes(CHUNK_BYTES), 0, time.perf_counter() + SEND_SECONDS
            while sent < SEND_BYTES and time.perf_counter() < end:
                self._socket.sendall(chunk)
                sent += len(chunk)
            self._socket.shutdown(socket.SHUT_WR)
            return float(json.loads(self._socket.recv(100)))


def rate(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes a second, from when a quarter had arrived to the end: TCP begins slowly.

    Args:
        samples: (time in seconds, bytes that had arrived by then), in order.
    """
    last, total = samples[-1]
    began, before = next(sample for sample in samples if sample[1] >= total / 4)
    return (total - before) / max(last - began, 1e-6)


def _set_up(connection: socket.socket) -> None:
    connection.settimeout(WAIT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read(connection: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: The peer ended the connection.
    """
    found = b""
    while len(found) < size:
        more = connection.recv(size - len(found))
        if not more:
            raise ConnectionError("the connection was closed")
        found += more
    return found

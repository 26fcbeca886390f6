"""What the driver asks of a node: a small process on it, which Ray starts and which imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence

from distft.orchestrate.nodes.facts import Facts, gather
from distft.orchestrate.nodes.network import Connection, Listener
from distft.orchestrate.nodes.shared import Shared, trouble_of


class Probe:
    """A Ray actor on a node.

    Args:
        address: The node's.
        token: What its connections to others begin with.
    """

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._token = token.encode()
        self._connection: Connection | None = None

    def look(self, folders: Sequence[str], places: Sequence[Shared], me: str) -> tuple[Facts, list[str | None]]:
        """What the node says of itself, and what is wrong with each place, where it calls itself ``me``."""
        from ray._private.worker import _global_node

        facts = gather(self._address, folders, _global_node.get_temp_dir_path())
        return facts, [trouble_of(place, me) for place in places]

    def now(self) -> float:
        """Its clock: seconds since the epoch."""
        return time.time()

    def device(self) -> tuple[str, bool]:
        """What its device calls itself, and whether that is fast at bf16; imports torch."""
        from distft.plan.hardware import Hardware

        found = Hardware.detect()
        return found.name, found.fast_bf16

    def listen(self) -> int:
        """Waits for a connection from another node; the port."""
        return Listener(self._token).port

    def connect(self, address: str, port: int) -> float:
        """Connects to the node that listens there: seconds there and back."""
        self._connection = Connection(address, port, self._token)
        return self._connection.round_trip_seconds()

    def send(self) -> float:
        """How many bytes a second arrive there."""
        assert self._connection is not None
        return self._connection.bytes_per_second()

    def clear(self, places: Sequence[Shared]) -> None:
        """Removes what it has written where the driver does not see it."""
        for place in places:
            place.clear()

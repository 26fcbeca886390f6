"""Being told to stop: Ctrl-C and SIGTERM, which is how clusters, containers and batch systems say it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Asked:
    """Whether somebody has been told to stop; ``at_once``: without a checkpoint."""

    def __init__(self) -> None:
        self.stop = False
        self.at_once = False

    def __bool__(self) -> bool:
        return self.stop


@contextlib.contextmanager
def stopping(say: Callable[[str], None]) -> Iterator[Asked]:
    """The first signal is told to whoever looks, so that there can be a checkpoint; the second ends at once."""
    asked = Asked()

    def ask(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        if asked:
            raise KeyboardInterrupt
        asked.stop = True
        say("Stopping after this step, with a checkpoint. Ctrl-C again ends at once, without one.")

    with _handling(ask):
        yield asked


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is as Ctrl-C; entered after Ray has started, which puts in a handler of its own that prints its stack."""
    with _handling(signal.default_int_handler, signal.SIGTERM):
        yield


def wait_for_stop(check: Callable[[], None]) -> None:
    """Returns at Ctrl-C or SIGTERM; the next one is a KeyboardInterrupt again.

    Args:
        check: Called every second; what it raises ends the wait.
    """
    asked = threading.Event()
    with _handling(lambda *_: asked.set()):
        while not asked.wait(1):  # in pieces: a signal's handler runs between them
            check()


@contextlib.contextmanager
def _handling(handler: Callable[..., object], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers, and gets signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)

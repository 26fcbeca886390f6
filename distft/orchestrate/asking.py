"""Questions to a cluster whose head may never answer them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Question(Generic[T]):
    """Something that the cluster's head is asked every so often, without waiting: a head that is gone does not answer.

    Args:
        ask: Asks it, and blocks until it answers.
        seconds: From the answer to the next time.
    """

    def __init__(self, ask: Callable[[], T], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._due = time.monotonic() + seconds
        self._asked: Future[T] | None = None

    @property
    def waiting_seconds(self) -> float:
        """For how long an answer has been waited for."""
        return 0.0 if self._asked is None else time.monotonic() - self._due

    def answer(self) -> T | None:
        """The answer, once each time that it was asked; None where there is no new one."""
        if self._asked is None and time.monotonic() >= self._due:
            self._asked = in_background(self._ask)
        if self._asked is None or not self._asked.done():
            return None
        answer, self._asked = self._asked.result(), None
        self._due = time.monotonic() + self._seconds
        return answer


def in_background(work: Callable[[], T]) -> Future[T]:
    """Does something in a daemon thread of its own, unlike an executor: a process that ends does not wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

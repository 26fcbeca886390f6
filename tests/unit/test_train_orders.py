"""What rank 0 makes of a stop request, and when training counts as standing still."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from distft.errors import RunError
from distft.runs import Run, StopRequest, write_json
from distft.train.orders import NO_ORDERS, Listening, Orders, asked
from distft.train.watchdog import stall_seconds
from tests.support import ROOT


def listening(run: Run, save_seconds: float = 0.0) -> Listening:
    return Listening(run.asked, lambda: save_seconds)


@pytest.mark.parametrize(
    "orders", [NO_ORDERS, Orders(save=True), Orders("interrupt"), Orders("resize"), Orders("preempted")]
)
def test_orders_cross_the_exchange(orders: Orders) -> None:
    others = [NO_ORDERS.encoded()] * 3
    assert Orders.decoded([sum(column) for column in zip(orders.encoded(), *others, strict=True)]) == orders


def test_a_request_is_heard_and_can_be_taken_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    asks = listening(run)
    assert asks() == NO_ORDERS
    run.ask(StopRequest("interrupt"))
    assert asks() == Orders("interrupt")
    run.stop_request.unlink()
    assert asks() == NO_ORDERS


def test_a_worker_of_a_group_that_was_given_up_stops(tmp_path: Path) -> None:
    """It was cut off, and still sees the run's files: two groups must not write them."""
    run = Run(tmp_path)
    write_json(run.group, 1763900000.123456)
    assert asked(run, 1763900000.123456) is None
    run.ask(StopRequest("resize"))
    assert asked(run, 1763900000.123456) == StopRequest("resize")
    assert asked(run, None) == StopRequest("resize"), "under torchrun there is no other group"
    write_json(run.group, 1763900042.5)
    with pytest.raises(RunError, match="other workers have taken this run over"):
        asked(run, 1763900000.123456)


def test_before_a_node_goes_it_saves_at_once_and_again_just_before(tmp_path: Path) -> None:
    run = Run(tmp_path)
    asks = listening(run)
    run.ask(StopRequest("preempted", deadline=time.time() + 0.5))
    assert asks() == Orders(save=True)
    assert asks() == NO_ORDERS  # once is enough
    time.sleep(0.3)
    assert asks() == Orders("preempted")  # another step of 0.3 s would end after the deadline


def test_a_notice_too_short_for_two_saves_stops_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.ask(StopRequest("preempted", deadline=time.time() + 10))
    assert listening(run, save_seconds=6.0)() == Orders("preempted")


def test_a_stall_is_ten_median_steps_and_at_least_a_minute() -> None:
    assert stall_seconds(5.0, [100.0]) == 5.0
    assert stall_seconds(None, []) == 60.0
    assert stall_seconds(None, [1.0, 2.0, 3.0]) == 60.0
    assert stall_seconds(None, [10.0, 20.0, 900.0]) == 200.0


STANDS_STILL = """
import sys, time
from pathlib import Path
from distft.train.watchdog import Watchdog

def waiting_for_the_others():
    time.sleep(3)

with Watchdog(Path(sys.argv[1]), 0.5) as watchdog:
    watchdog.alive()
    waiting_for_the_others()
"""


def test_a_rank_that_stands_still_writes_down_where(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.stack"
    subprocess.run([sys.executable, "-c", STANDS_STILL, str(path)], check=True, cwd=ROOT)
    assert "waiting_for_the_others" in path.read_text()

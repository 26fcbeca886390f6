"""What becomes of a run whose workers fail, decided from the failure and those before it."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from distft.orchestrate.train.policy import (
    PREEMPTIONS_WITHOUT_PROGRESS,
    Decision,
    Failure,
    GiveUp,
    HalveMicroBatch,
    Kind,
    Restart,
    decide,
)


def lost(step: int | None = 5, text: str = "its process died") -> Failure:
    return Failure("lost", text, (1,), step)


def bug(step: int | None = 5, text: str = "ValueError: no such row") -> Failure:
    return Failure("error", text, (0, 1), step)


def preempted(step: int | None) -> Failure:
    return Failure("preempted", "its node is about to go", (1,), step)


def after(failure: Failure, *history: Failure, max_failures: int = 3, micro_batch_size: int = 8) -> Decision:
    return decide(failure, history, max_failures=max_failures, micro_batch_size=micro_batch_size)


def run(failures: list[Failure], **settings: Any) -> list[Decision]:
    """The decision after each of them, as long as the run goes on."""
    made: list[Decision] = []
    for number, failure in enumerate(failures):
        made.append(after(failure, *failures[:number], **settings))
        if isinstance(made[-1], GiveUp):
            break
    return made


@pytest.mark.parametrize("kind", ["lost", "stalled", "error", "start_timeout"])
def test_a_first_failure_is_started_again(kind: Kind) -> None:
    assert after(Failure(kind, "x", step=3)) == Restart()


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_failures_are_counted_over_the_whole_run_however_far_it_has_come(max_failures: int) -> None:
    made = run([lost(step) for step in range(0, 1000, 100)], max_failures=max_failures)
    assert [type(one) for one in made] == [Restart] * max_failures + [GiveUp]
    assert str(made[-1]).count("its process died") == 1


def test_the_last_failure_is_named_when_there_were_too_many() -> None:
    (*_, last) = run([bug(1, "A"), lost(2), Failure("stalled", "rank 0 waits", step=3)], max_failures=2)
    assert isinstance(last, GiveUp)
    assert last.reason == "failed 3 times, the last time of: rank 0 waits"
    assert "cluster.max_failures" in last.fix


def test_the_same_error_twice_at_the_same_step_ends_the_run_at_once_and_is_said_once_with_its_ranks() -> None:
    decision = after(bug(), lost(3), bug(), max_failures=100)
    assert decision == GiveUp(
        "the same error twice after step 5: [rank 0, 1] ValueError: no such row",
        "an error of the code or the data: mend it",
    )
    assert isinstance(after(bug(None), bug(None)), GiveUp)
    assert "before the first step" in str(after(bug(None), bug(None)))
    assert "before the first step" in str(after(bug(0), bug(0)))


@pytest.mark.parametrize("other", [bug(6), bug(None), bug(text="ValueError: no such column"), lost(5)])
def test_another_error_or_another_step_is_another_failure(other: Failure) -> None:
    assert after(bug(), other) == Restart()


def test_an_error_is_the_same_whatever_addresses_it_names() -> None:
    first = bug(text="TypeError: <Row object at 0x7f3a10> of pid=4711")
    assert isinstance(after(bug(text="TypeError: <Row object at 0x55d2b8> of pid=4712"), first), GiveUp)


def test_two_workers_lost_at_the_same_step_are_bad_luck() -> None:
    assert after(lost(), lost()) == Restart()


def test_the_micro_batch_is_halved_until_it_is_one_row() -> None:
    full = Failure("out_of_memory", "CUDA out of memory", (0,), None)
    sizes = []
    size, history = 12, []
    while isinstance(made := after(full, *history, micro_batch_size=size, max_failures=0), HalveMicroBatch):
        history.append(full)
        size = made.rows
        sizes.append(size)
    assert sizes == [6, 3, 1]
    assert isinstance(made, GiveUp)
    assert "one row a pass: [rank 0] CUDA out of memory" in made.reason


def test_running_out_of_memory_is_not_counted() -> None:
    full = Failure("out_of_memory", "x", step=1)
    assert after(lost(), full, full, full, max_failures=1) == Restart()


def test_preemptions_are_not_counted_while_the_run_gets_on() -> None:
    assert set(run([preempted(step) for step in range(1, 50)], max_failures=0)) == {Restart()}
    assert after(lost(50), *(preempted(step) for step in range(1, 50)), max_failures=1) == Restart()


def test_preemptions_that_leave_no_time_for_a_step_end_the_run() -> None:
    made = run([preempted(9)] * 50, max_failures=0)
    assert len(made) == PREEMPTIONS_WITHOUT_PROGRESS
    assert isinstance(made[-1], GiveUp)
    assert len(run([preempted(None)] * 50)) == PREEMPTIONS_WITHOUT_PROGRESS
    once_more = [preempted(9)] * 4 + [preempted(10)] + [preempted(10)] * 4
    assert [type(one) for one in run(once_more)] == [Restart] * 8 + [GiveUp]


def test_no_crash_loop_is_endless() -> None:
    """Whatever two kinds of failure take turns, at one step for ever, the run ends."""
    for first, second in itertools.product(get_args(Kind), repeat=2):
        size, history = 64, []
        for number in range(60):
            failure = Failure(second if number % 2 else first, f"text {number}", step=4)
            made = decide(failure, history, max_failures=3, micro_batch_size=size)
            if isinstance(made, GiveUp):
                break
            size = made.rows if isinstance(made, HalveMicroBatch) else size
            history.append(failure)
        else:
            pytest.fail(f"{first} and {second} go on for ever")

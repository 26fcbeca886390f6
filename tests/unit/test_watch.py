"""What the driver asks the cluster beside training."""

from __future__ import annotations

import threading
import time

from distft.orchestrate.asking import Question


def answer_of(question: Question[int]) -> int:
    end = time.monotonic() + 10
    while (answer := question.answer()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return answer


def test_a_head_that_does_not_answer_keeps_nobody_waiting() -> None:
    back, times = threading.Event(), []

    def ask() -> int:
        times.append(time.monotonic())
        back.wait()
        return len(times)

    question = Question(ask, 0.0)
    assert question.waiting_seconds == 0
    for _ in range(3):
        assert question.answer() is None
        time.sleep(0.01)
    assert question.waiting_seconds >= 0.02
    back.set()
    assert answer_of(question) == 1, "it was asked once, not each time that somebody looked"
    assert question.waiting_seconds == 0
    assert answer_of(question) == 2


def test_a_question_is_put_every_so_often() -> None:
    question = Question(lambda: 1, 0.1)
    began = time.monotonic()
    answer_of(question)
    answer_of(question)
    assert time.monotonic() - began >= 0.2

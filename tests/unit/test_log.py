"""What libraries warn of, told once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft.log import Warned
from distft.runs import Run, read_lines
from distft.train.reporter import FileReporter


@pytest.fixture
def library() -> Iterator[logging.Logger]:
    """A logger that passes nothing on, as DeepSpeed's and transformers' do."""
    logger = logging.getLogger("somelibrary.inner")
    logger.propagate = False
    handler = logging.NullHandler()
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def test_a_warning_is_told_once_whatever_its_numbers(library: logging.Logger) -> None:
    with Warned() as warned:
        for flushes in (3, 17):
            library.warning("%d cache flushes since the last step", flushes)
        library.info("nothing of interest")
        library.warning("another\n  thing")
        assert warned.new() == ["somelibrary: 3 cache flushes since the last step", "somelibrary: another thing"]
        library.error("another thing")
        assert not warned.new()
    library.warning("after it")
    assert not warned.new()


def test_what_python_warns_of_is_told_and_still_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with Warned() as warned:
            place = "/home/somebody/lib/python3.11/site-packages/torch/nn/modules/linear.py"
            warnings.warn_explicit("gradients are strided otherwise", UserWarning, place, 7)
            warnings.warn_explicit("will go in 3.0", FutureWarning, place, 8)
            warnings.warn_explicit("a division by zero", RuntimeWarning, "/home/somebody/reward.py", 1)
            assert warned.new() == ["torch: gradients are strided otherwise", "reward: a division by zero"]
    assert len(shown) == 3


def test_chatter_and_our_own_words_and_a_flood_are_left_out(library: logging.Logger) -> None:
    with Warned() as warned:
        library.warning(
            "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
        )
        logging.getLogger("distft").warning("ours")
        logging.getLogRecordFactory()("somelibrary", logging.WARNING, __file__, 1, "%d and %d", (1,), None)
        for letter in "abcdefghijklmnopqrstuvwxyz":
            library.warning(letter * 1000)
        told = warned.new()
    assert len(told) == 20
    assert all(line.startswith("somelibrary: ") and len(line) == 300 for line in told)


def test_warnings_reach_the_metrics_beside_what_training_tells(library: logging.Logger, tmp_path: Path) -> None:
    run = Run(tmp_path)
    with Warned() as warned, FileReporter(run, is_main=True, warned=warned) as reporter:
        library.warning("at the start")
        reporter.train({"kind": "train", "step": 1, "loss": 2.0})
        library.warning("at the start")
        reporter.train({"kind": "train", "step": 2, "loss": 1.0})
        library.warning("at the end")
    told = [(line["step"], line["reason"]) for line in read_lines(run.metrics) if line.get("event") == "warning"]
    assert told == [(1, "somelibrary: at the start"), (2, "somelibrary: at the end")]

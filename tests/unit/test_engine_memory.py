"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc

import psutil
import pytest
import torch

from distft.engine.memory import give_back_free_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc can be told to give memory back")
def test_holes_between_what_stays_are_given_back() -> None:
    held = psutil.Process().memory_info
    give_back_free_memory()  # of the tests before
    before = held().rss
    blocks = [torch.ones(16_384) for _ in range(4_000)]  # 64 kB each, too small for malloc to map one by one
    stay = blocks[::200]
    del blocks
    gc.collect()
    holes = held().rss - before
    give_back_free_memory()
    assert holes > 200e6
    assert held().rss - before < 0.2 * holes
    assert all(bool(one.eq(1).all()) for one in stay)

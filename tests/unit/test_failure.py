"""What Ray Train says of failed workers, and what the driver makes of stacks and processes."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distft.orchestrate.train.failure import failure_of
from distft.orchestrate.train.places import Place, _process, _states, read_places
from distft.orchestrate.train.policy import Failure
from distft.orchestrate.train.stall import START_SECONDS, StallClock, explain, training_stack
from distft.runs import Run, write_json
from distft.train.watchdog import Watchdog


def group_error(**failures: BaseException) -> Exception:
    """What ``fit`` raises when ranks failed, as Ray Train makes it."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("text", {int(rank[1:]): failure for rank, failure in failures.items()})  # type: ignore[misc]


def died(text: str = "") -> Exception:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    error = ActorDiedError()
    error.error_msg = text
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=error)


def raised(error: BaseException) -> Exception:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    return UserExceptionWithTraceback(error, "Traceback ...")


#: As Ray 2.60 words it: it lists what might have been.
WORKER_DIED = """The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. There are some potential root causes. (1) The process is
killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The worker is crashed
unexpectedly due to SIGSEGV or other unexpected errors."""
NODE_DIED = "The actor died because its node has died. Node Id: 3c4a7b"

PEER = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")


def test_a_rank_that_is_gone_explains_the_others() -> None:
    failure = failure_of(group_error(r0=raised(PEER), r1=died(WORKER_DIED)))
    assert failure == Failure("lost", "its process died", (1,))
    assert failure_of(group_error(r0=raised(PEER))).kind == "lost"
    assert failure_of(group_error(r1=died(NODE_DIED))) == Failure("lost", "its node is gone", (1,))


def test_an_error_is_told_once_with_all_its_ranks() -> None:
    failure = failure_of(group_error(r0=raised(ValueError("no\nsuch row")), r2=raised(ValueError("no\nsuch row"))))
    assert failure == Failure("error", "ValueError: such row", (0, 2))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:123] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_running_out_of_memory_is_known_by_its_words_and_explains_lost_peers(error: Exception) -> None:
    failure = failure_of(group_error(r0=raised(PEER), r1=raised(error)))
    assert (failure.kind, failure.ranks) == ("out_of_memory", (1,))
    killed = died("Task was killed due to the node running low on memory.")
    assert failure_of(group_error(r0=killed, r1=raised(PEER))).kind == "out_of_memory"


def test_torch_says_so_in_these_words() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert failure_of(group_error(r0=raised(caught.value))).kind == "out_of_memory"


def test_workers_that_do_not_start_are_another_kind() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    assert failure_of(ControllerError(WorkerGroupStartupTimeoutError(2))).kind == "start_timeout"
    assert failure_of(ControllerError(ValueError("x"))) == Failure("error", "x")
    died = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    died.__cause__ = ActorDiedError()
    lost = failure_of(ControllerError(died))
    assert (lost.kind, lost.text) == ("lost", "its process died, while the workers were started")
    assert failure_of(ControllerError(RuntimeError("Connection closed by peer"))).kind == "lost"


def place(rank: int, **facts: Any) -> Place:
    here = {"pid": os.getpid(), "started": 0, "node": "n", "host": "10.0.0.1"}
    return Place(rank=rank, attempt=1.5, **{**here, **facts})


def test_a_process_is_known_by_its_start_too_and_only_then_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = _process(child.pid)[1]
    assert _states([(child.pid, started + 1)], kill=True) == ["gone"]
    assert child.poll() is None
    assert _states([(child.pid, started)], kill=True)[0] in "RSD"  # running, asleep, or reading from a disk
    assert child.wait(5) == -9
    assert _states([(child.pid, started)], kill=False) == ["gone"]


def test_places_of_earlier_groups_are_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for one in (place(0), place(1), place(2, pid=9)):
        attempt = 1.0 if one.rank == 2 else 1.5
        write_json(run.logs / f"rank-{one.rank}.json", {**vars(one), "attempt": attempt})
    (run.logs / "rank-3.json").write_text("{")
    assert read_places(run, 1.5) == [place(0), place(1)]


def test_the_training_threads_stack_is_found_in_a_real_dump(tmp_path: Path) -> None:
    """A module below distft/train waits in a thread of its own, as Ray Train has it; the main thread is elsewhere."""
    module = tmp_path / "distft" / "train" / "waiting.py"
    module.parent.mkdir(parents=True)
    module.write_text("def wait(event):\n    event.wait()\n")
    code = compile(module.read_text(), str(module), "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    event = threading.Event()
    thread = threading.Thread(target=names["wait"], args=(event,))
    thread.start()
    path = tmp_path / "stack"
    with path.open("w") as file:
        file.write("an earlier dump\n")
        file.flush()
        faulthandler.dump_traceback_later(0.05, file=file)
        time.sleep(0.5)
    event.set()
    thread.join()
    stack = training_stack(path.read_text())
    frame = next(frame for frame in stack if "/distft/" in frame.file)
    assert frame == (str(module), 2, "wait")
    assert stack[0].file.endswith("threading.py")
    assert training_stack("") == []


DUMP = """Timeout (0:00:05)!
Thread 0x00007f0a (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
  File "/site-packages/ray/worker.py", line 3 in main_loop

Thread 0x00007f0b (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/src/distft/engine/zero.py", line 200 in sum_over_ranks
  File "/src/distft/train/loop.py", line 150 in step
"""


#: Of a rank at ZeRO stage 3 whose peer was stopped.
GATHERING = """Timeout (0:00:08)!
Thread 0x00007f0b (most recent call first):
  File "/v/site-packages/deepspeed/utils/nvtx.py", line 33 in wrapped_fn
  File "/v/site-packages/deepspeed/runtime/zero/partition_parameters.py", line 720 in wait
  File "/v/site-packages/deepspeed/runtime/zero/partition_parameters.py", line 820 in wait
  File "/v/site-packages/deepspeed/runtime/zero/partitioned_param_coordinator.py", line 406 in _fetch_sub_module_impl
  File "/src/distft/model/loss.py", line 114 in _losses
  File "/src/distft/train/loop.py", line 150 in step
"""


def test_a_rank_that_waits_for_gathered_weights_waits_for_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.logs.mkdir()
    (run.logs / "rank-0.stack").write_text(GATHERING)
    text = explain(8.0, 140, [place(0)], {0: "S"}, run)
    assert "waits for the others in wait, called by _losses" in text
    (run.logs / "rank-0.stack").write_text(GATHERING.replace(" in wait\n", " in fetch\n"))
    assert "waits for the others" not in explain(8.0, 140, [place(0)], {0: "S"}, run)


def test_the_explanation_begins_with_the_rank_that_the_others_wait_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.logs.mkdir()
    for rank in (0, 1, 2):
        (run.logs / f"rank-{rank}.stack").write_text(DUMP)
    (run.logs / "rank-1.stack").write_text("")
    text = explain(6.2, 12, [place(0), place(1), place(2)], {0: "S", 1: "T", 2: "S"}, run)
    assert text.startswith("no sign of life for 6 s after step 12: rank 1 (pid")
    assert "is stopped by a signal (SIGSTOP)" in text
    assert text.count("waits for the others in") == 1
    assert "called by sum_over_ranks (distft/engine/zero.py:200)" in text
    assert "node does not answer" in explain(6.2, None, [place(0)], {}, run)


def test_signs_of_life_are_lines_and_touched_files_but_not_dumps(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with Watchdog(run.logs / "rank-0.stack", 1.0) as watchdog:
        clock = StallClock(run, 1.0)
        assert clock.allowed_seconds == START_SECONDS
        clock.record({"kind": "train", "step_seconds": 0.1})
        for _ in range(6):
            time.sleep(0.3)
            watchdog.alive()
            assert clock.stalled_seconds() is None
        end = time.monotonic() + 5
        while (seconds := clock.stalled_seconds()) is None and time.monotonic() < end:
            time.sleep(0.05)
        assert seconds is not None
        assert seconds < 1.9
        assert "Timeout" in (run.logs / "rank-0.stack").read_text()
        clock.record({"kind": "event"})
        assert clock.stalled_seconds() is None

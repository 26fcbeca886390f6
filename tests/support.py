"""What tests share: real processes that form a process group, and a tiny model with its data."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ranks:
    """How processes that ran together ended: exit status and output of each, by rank."""

    statuses: list[int]
    outputs: list[str]

    def __str__(self) -> str:
        return "\n".join(
            f"--- rank {rank} ended with {status}\n{output[-4000:]}"
            for rank, (status, output) in enumerate(zip(self.statuses, self.outputs, strict=True))
        )


def start_ranks(
    command: Sequence[str], world_size: int, folder: Path, env: Mapping[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Starts ``command`` once per rank, with what torchrun would set; output goes to ``folder/rank-N.txt``."""
    processes = []
    for rank, variables in enumerate(_variables(world_size)):
        with (folder / f"rank-{rank}.txt").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    command, env={**variables, **(env or {})}, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
                )
            )
    return processes


def _variables(world_size: int) -> list[dict[str, str]]:
    """The environment of each rank: what torchrun would set."""
    port = free_port()
    return [
        {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        for rank in range(world_size)
    ]


def wait_for_ranks(
    processes: Sequence[subprocess.Popen[bytes] | _Forked], folder: Path, timeout_seconds: float
) -> Ranks:
    """Waits for all; one that fails, or the timeout, ends the others."""
    end = time.monotonic() + timeout_seconds
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                time.sleep(2)  # the others may be about to fail of the same
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        statuses = [process.wait() for process in processes]
    outputs = [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(len(processes))]
    return Ranks(statuses, outputs)


def run_ranks(
    work: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 240,
    expect: int = 0,
) -> list[Any]:
    """Calls ``work(*args)`` in each of ``world_size`` real processes that form a gloo process group.

    Args:
        work: A function at the top level of a test module.
        world_size: Number of processes.
        *args: What it is called with; plain JSON values.
        env: More environment variables.
        timeout_seconds: After which all of them are killed.
        expect: The exit status that every rank must end with.

    Returns:
        Each rank's result, a JSON value, or None where it was killed.

    Raises:
        AssertionError: A rank ended otherwise; the message shows every rank's output.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = Path(str(sys.modules[work.__module__].__file__))
        call = json.dumps([str(source), work.__name__, list(args), str(folder)])
        if env is None:
            processes = [
                _FORKED.Process(target=_forked, args=(call, variables, str(folder / f"rank-{rank}.txt")))
                for rank, variables in enumerate(_variables(world_size))
            ]
            for process in processes:
                process.start()
            ranks = wait_for_ranks([_Forked(process) for process in processes], folder, timeout_seconds)
        else:  # which its imports may depend on
            command = [sys.executable, "-m", "tests.support", call]
            ranks = wait_for_ranks(start_ranks(command, world_size, folder, env), folder, timeout_seconds)
        assert all(status == expect for status in ranks.statuses), f"\n{ranks}"
        results = [folder / f"result-{rank}.json" for rank in range(world_size)]
        return [json.loads(path.read_text()) if path.exists() else None for path in results]


#: Importing torch, transformers and DeepSpeed takes ten seconds of a core: once for all ranks of all tests.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.preloaded"])


class _Forked:
    """A forked rank with as much of ``subprocess.Popen`` as waiting needs."""

    def __init__(self, process: multiprocessing.context.ForkServerProcess) -> None:
        self._process = process
        self.kill = process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return int(self._process.exitcode or 0)


def _forked(call: str, variables: dict[str, str], output: str) -> None:
    """One rank of :func:`run_ranks`, forked."""
    os.environ.clear()
    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    _main(call)


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_at(path: Path, processes: list[subprocess.Popen[bytes]], timeout_seconds: float = 120) -> None:
    """Kills the processes (SIGKILL) as soon as ``path`` exists."""
    end = time.monotonic() + timeout_seconds
    while not path.exists() and time.monotonic() < end and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)


def _main(call: str) -> None:
    """One rank of :func:`run_ranks`."""
    source, name, args, folder = json.loads(call)
    module = ".".join(Path(source).relative_to(ROOT).with_suffix("").parts)
    result = getattr(importlib.import_module(module), name)(*args)
    (Path(folder) / f"result-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1])

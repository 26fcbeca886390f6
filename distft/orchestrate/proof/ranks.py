"""Real processes of this machine that train together over gloo, without Ray: what ``verify`` runs its cases in."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from distft.errors import DistftError, RunError

#: What ranks that train import, imported once: they are forked from a process that has it.
PRELOADED = "distft.train.preloaded"
#: Seconds that ranks may take to fail of the same, before the others are ended.
GRACE_SECONDS = 3.0


def run_ranks(
    work: Callable[..., None],
    world_size: int,
    args: Sequence[object],
    folder: Path,
    watch: Callable[[], None],
    preload: Sequence[str] = (PRELOADED,),
) -> list[int]:
    """Calls ``work(*args)`` in each of ``world_size`` processes that see what torchrun would set, and no GPU.

    Args:
        work: A function that can be pickled.
        world_size: Number of processes.
        args: What it is called with.
        folder: Where what each of them prints goes.
        watch: Called twice a second while they run.
        preload: What every rank imports; the first call of a process decides.

    Returns:
        Their exit statuses by rank, negative for a signal. One that ends before its time ends the others.

    Raises:
        DistftError: What a rank raised.
        RunError: A rank failed of something else than SIGKILL.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    processes = []
    with _environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        for rank in range(world_size):
            variables = _variables(rank, world_size, port)
            process = context.Process(target=_rank, args=(work, args, variables, folder / f"rank-{rank}"))
            process.start()
            processes.append(process)
    _wait(processes, watch)
    statuses = [process.exitcode or 0 for process in processes]
    for rank in range(world_size):
        error = folder / f"rank-{rank}.error"
        if error.exists():
            failure: DistftError = pickle.loads(error.read_bytes())
            raise failure
    if any(statuses) and -signal.SIGKILL not in statuses:
        rank = next(rank for rank, status in enumerate(statuses) if status)
        said = (folder / f"rank-{rank}.txt").read_text(errors="replace").strip().splitlines()
        raise RunError(f"it ended with status {statuses[rank]}", where=f"rank {rank}", fix="\n  ".join(said[-5:]))
    return statuses


def _wait(processes: Sequence[ForkServerProcess], watch: Callable[[], None]) -> None:
    try:
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.join(GRACE_SECONDS)
                return
            processes[0].join(0.5)
            watch()
    finally:
        for process in processes:
            process.kill()
            process.join()


def _variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }


def _rank(work: Callable[..., None], args: Sequence[object], variables: Mapping[str, str], place: Path) -> None:
    """One rank: what it prints goes to ``place.txt``, an error that it raises to ``place.error``."""
    os.environ.update(variables)
    file = os.open(place.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    import torch

    torch.set_num_threads(1)
    try:
        work(*args)
    except DistftError as error:
        place.with_suffix(".error").write_bytes(pickle.dumps(error))
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that the process which ranks are forked from begins with."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

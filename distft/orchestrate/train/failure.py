"""What Ray Train says of workers that failed, read as a :class:`~.policy.Failure`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from distft.orchestrate.train.policy import Failure, Kind

#: How torch, its allocators and Ray say that memory ran out: PyTorch's CUDA and CPU allocators
#: (c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp), and Ray's memory monitor.
_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|DefaultCPUAllocator: (can't|not enough)|not enough memory: you tried to allocate|"
    r"CUDNN_STATUS_ALLOC_FAILED|running low on memory|OutOfMemoryError|MemoryError|std::bad_alloc"
)

#: What the others see when a peer is gone: gloo's and NCCL's words, and torch's store's.
_PEER_GONE = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket closed|failed to recv, got 0 bytes|"
    r"ncclRemoteError|ncclSystemError|remote process exited|Timed out waiting \d+ms|No route to host"
)


def failure_of(error: BaseException) -> Failure:
    """How a group of workers failed, from what ``TorchTrainer.fit`` raised.

    One cause is picked where ranks say different things: a rank that is gone makes the others fail too.
    """
    from ray.train.v2.api.exceptions import ControllerError

    if isinstance(error, ControllerError):
        return _of_start(error.controller_failure)
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    if not failures:
        return Failure("error", _last_line(str(error)))
    found = {rank: _of_rank(failure) for rank, failure in sorted(failures.items())}
    cause = min((cause for cause, _ in found.values()), key=_PRECEDENCE.index)
    by_text: dict[str, list[int]] = {}
    for rank, (other, text) in found.items():
        if other == cause:
            by_text.setdefault(text, []).append(rank)
    kind: Kind = "lost" if cause == "peers_lost" else cause
    if len(by_text) == 1:
        ((text, ranks),) = by_text.items()
        return Failure(kind, text, tuple(ranks))
    return Failure(kind, "; ".join(f"[rank {', '.join(map(str, who))}] {text}" for text, who in by_text.items()))


def _of_start(error: BaseException) -> Failure:
    """How workers failed that had not begun to train."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    if isinstance(error, WorkerGroupStartupTimeoutError):
        return Failure("start_timeout", "the workers did not start in time")
    cause = error.__cause__ or error
    text = str(cause)
    if isinstance(cause, RayActorError):
        return Failure("lost", f"{_death(text)}, while the workers were started")
    gone = _PEER_GONE.search(text)
    return Failure("lost", f"workers lost their peers ({gone[0]})") if gone else Failure("error", _last_line(text))


#: What became of one rank. Where several things are seen at once, what explains the others comes first.
_Cause = Literal["preempted", "out_of_memory", "lost", "peers_lost", "error"]
_PRECEDENCE: tuple[_Cause, ...] = get_args(_Cause)


def _of_rank(failure: BaseException) -> tuple[_Cause, str]:
    """What became of one rank, in a line."""
    cause = getattr(failure, "health_check_failure", None)
    if cause is not None or type(failure).__name__ == "WorkerHealthCheckTimeoutError":
        text = str(cause or failure)
        if getattr(cause, "preempted", False):
            return "preempted", "its node was taken away"
        if _OUT_OF_MEMORY.search(text):
            return "out_of_memory", "killed by Ray because its node ran out of memory"
        return "lost", _death(text)
    base = getattr(failure, "_base_exc", failure)
    text = str(base).strip()
    name = type(base).__name__
    if _OUT_OF_MEMORY.search(f"{name}: {text}"):
        return "out_of_memory", _last_line(text) or name
    line = f"{name}: {_last_line(text)}" if text else name
    gone = _PEER_GONE.search(text)
    return ("peers_lost", f"lost its peers ({gone[0]})") if gone else ("error", line)


def _death(text: str) -> str:
    """How a process ended, from Ray's long account of it."""
    if "node" in text and re.search(
        r"node (has )?(died|dead|was terminated|is dead)|node failure", text, re.IGNORECASE
    ):
        return "its node is gone"
    if "hanging for" in text:
        return "did not answer"
    return "its process died"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""

"""Noticing from outside that training stands still, and saying in one explanation why.

Each rank writes its stack when it has waited for too long (:mod:`distft.train.watchdog`); what the system says of its
process tells of the rest: a process that is stopped, gone, or on a node that does not answer writes none.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distft.orchestrate.train.places import Place
from distft.runs import Run
from distft.train.watchdog import stall_seconds

#: How long a group of workers may take to its first step: large models come over the network, GPUs compile kernels.
START_SECONDS = 1200.0

#: The ranks' stacks come when the driver begins to wait for them, or a little later.
STACK_SECONDS = 3.0


class StallClock:
    """Tells when a group of workers has shown no sign of life for too long.

    Signs of life are new lines of ``metrics.jsonl``, and the ranks' stack files: a rank touches its own as it works,
    also in the middle of a validation or while it waits for the disk.

    Args:
        run: The run.
        set_seconds: How long is too long; None for automatic.
    """

    def __init__(self, run: Run, set_seconds: float | None) -> None:
        self._run = run
        self._set_seconds = set_seconds
        self._steps: deque[float] = deque(maxlen=20)
        self._last = time.monotonic()
        self._touched = self._stacks()

    def record(self, record: Mapping[str, Any]) -> None:
        """A new line of ``metrics.jsonl``."""
        self._last = time.monotonic()
        if record["kind"] == "train":
            self._steps.append(record["step_seconds"])

    @property
    def allowed_seconds(self) -> float:
        """How long is too long now."""
        return stall_seconds(self._set_seconds, self._steps) if self._steps else START_SECONDS

    def stalled_seconds(self) -> float | None:
        """How long there has been no sign of life, once that is too long."""
        now, before = self._stacks(), self._touched
        self._touched = now
        # A file that has grown holds a stack: the rank waits, and that is no sign of life.
        if any(
            before.get(path, (0, 0.0))[0] == size and before.get(path) != (size, at) for path, (size, at) in now.items()
        ):
            self._last = time.monotonic()
        seconds = time.monotonic() - self._last
        return seconds if seconds > self.allowed_seconds else None

    def _stacks(self) -> dict[Path, tuple[int, float]]:
        """Size and time of each rank's stack file."""
        found = {}
        for path in self._run.logs.glob("rank-*.stack"):
            facts = path.stat()
            found[path] = (facts.st_size, facts.st_mtime)
        return found


class Frame(NamedTuple):
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        short = re.sub(r"^.*/(?=(site-packages|distft)/)(site-packages/)?", "", self.file)
        return f"{self.function} ({short}:{self.line})"


def training_stack(dump: str) -> list[Frame]:
    """The training thread's frames, innermost first, in the last of the dumps that ``faulthandler`` has written."""
    last = dump.rpartition("Timeout (")[2]
    threads = [list(_frames(text)) for text in re.split(r"^(?:Current thread|Thread) ", last, flags=re.MULTILINE)]
    return next((frames for frames in threads if any(_ours(frame) for frame in frames)), [])


def _frames(text: str) -> Iterator[Frame]:
    for match in re.finditer(r'File "(.+?)", line (\d+) in (\S+)', text):
        yield Frame(match[1], int(match[2]), match[3])


def _ours(frame: Frame) -> bool:
    return "/distft/train/" in frame.file


#: Where a rank waits for the others. ZeRO-3 waits for weights that are being gathered in a file of its own.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_GATHERING = "deepspeed/runtime/zero/partition_parameters.py"

#: What Linux' letters for a process's state mean here (proc(5)).
_STATES = {
    "T": "is stopped by a signal (SIGSTOP), or suspended",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or a network file system, in the kernel",
    "Z": "has ended",
    "X": "has ended",
    "gone": "has ended",
    "unknown": "cannot be asked: its node does not answer",
}


def explain(seconds: float, step: int | None, places: Sequence[Place], states: Mapping[int, str], run: Run) -> str:
    """Why training stands still, rank by rank, those first that the others wait for.

    Args:
        seconds: For how long.
        step: The last one made.
        places: Where the ranks are.
        states: How their processes are.
        run: Their stacks are in its logs.
    """
    lines: dict[str, list[Place]] = {}
    for place in places:
        state = states.get(place.rank, "unknown")
        stack = training_stack(_read(run.logs / f"rank-{place.rank}.stack"))
        lines.setdefault(_STATES.get(state) or _waiting(stack), []).append(place)
    told = [
        f"{', '.join(map(str, who))} {what}"
        for what, who in sorted(lines.items(), key=lambda line: (_waits(line[0]), line[1][0].rank))
    ]
    after = "before the first step" if step is None else f"after step {step:,}"
    return f"no sign of life for {seconds:.0f} s {after}: " + "; ".join(told or ["no rank has begun to work"])


def _waiting(stack: Sequence[Frame]) -> str:
    """What a rank does whose process is well, from its stack."""
    if not stack:
        return "runs, and has left no stack"
    here = next(frame for frame in stack if "/distft/" in frame.file)
    joint = next((frame for frame in reversed(stack) if _is_joint(frame)), None)
    if joint is not None:
        return f"waits for the others in {joint.function}, called by {here}"
    return f"is in {stack[0]}" + ("" if stack[0] == here else f", called by {here}")


def _is_joint(frame: Frame) -> bool:
    gathers = frame.function == "wait" and frame.file.endswith(_GATHERING)
    return gathers or any(part in frame.file for part in _COLLECTIVES)


def _waits(what: str) -> bool:
    return what.startswith("waits for the others")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

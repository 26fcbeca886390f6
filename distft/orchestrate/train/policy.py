"""What becomes of a run when a group of workers has failed: a pure function of the failure and those before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: How a group of workers fails. ``lost``: a process, node or connection went away; ``error``: our code or the user's
#: raised; ``start_timeout``: the workers never came to run.
Kind = Literal["lost", "out_of_memory", "stalled", "preempted", "error", "start_timeout"]

#: Preemptions cost nothing while the run gets on; so many in a row without a new step mean that it cannot.
PREEMPTIONS_WITHOUT_PROGRESS = 5


@dataclass(frozen=True)
class Failure:
    """How one group of workers failed.

    Attributes:
        kind: What happened.
        text: The same for people, in a line or a few.
        ranks: Whom it struck; none where it is not known.
        step: The last step of the run that the group made or began after, or None where it did not come so far.
    """

    kind: Kind
    text: str
    ranks: tuple[int, ...] = ()
    step: int | None = None

    def __str__(self) -> str:
        struck = f"[rank {', '.join(map(str, self.ranks))}] " if self.ranks else ""
        return struck + self.text


@dataclass(frozen=True)
class Restart:
    """Start again from the newest sound checkpoint, with as many workers as there is room for."""


@dataclass(frozen=True)
class HalveMicroBatch:
    """Start again with smaller forward passes; the global batch stays.

    Attributes:
        rows: The most rows of a pass from now on.
    """

    rows: int


@dataclass(frozen=True)
class GiveUp:
    """End the run.

    Attributes:
        reason: For people, with the failure in it once.
        fix: What to do about it.
    """

    reason: str
    fix: str


Decision = Restart | HalveMicroBatch | GiveUp


def decide(failure: Failure, history: Sequence[Failure], *, max_failures: int, micro_batch_size: int) -> Decision:
    """What to do now.

    Running out of memory is not counted, since the micro-batch can be halved only so often, and neither are
    preemptions that leave time to get on. Everything else is counted over the whole run, however far it has come.

    Args:
        failure: The last one.
        history: Those before it, in order.
        max_failures: How many counted failures a run survives.
        micro_batch_size: Rows of a forward pass when it failed.
    """
    if failure.kind == "out_of_memory":
        return _after_out_of_memory(failure, micro_batch_size)
    if failure.kind == "preempted":
        return _after_preemption(failure, history)
    if failure.kind == "error" and any(_same(failure, earlier) for earlier in history):
        place = f"after step {failure.step:,}" if failure.step else "before the first step"
        return GiveUp(f"the same error twice {place}: {failure}", "an error of the code or the data: mend it")
    counted = sum(one.kind not in ("out_of_memory", "preempted") for one in (*history, failure))
    if counted <= max_failures:
        return Restart()
    if max_failures == 0:
        return GiveUp(str(failure), "cluster.max_failures above 0 would start it again")
    return GiveUp(f"failed {counted} times, the last time of: {failure}", "raise cluster.max_failures to go on longer")


def _after_out_of_memory(failure: Failure, micro_batch_size: int) -> Decision:
    if micro_batch_size > 1:
        return HalveMicroBatch(micro_batch_size // 2)
    return GiveUp(
        f"out of memory with one row a pass: {failure}",
        "use a higher zero.stage, zero.offload: cpu, train.activation_checkpointing: true, fewer data.max_tokens, "
        "or more workers",
    )


def _after_preemption(failure: Failure, history: Sequence[Failure]) -> Decision:
    """Goes on unless the last few were all preemptions, and none of them came further than what was before."""
    every = (*history, failure)
    stuck, reached = 0, -1
    for one in every:
        step = -1 if one.step is None else one.step
        stuck = stuck + 1 if one.kind == "preempted" and step <= reached else int(one.kind == "preempted")
        reached = max(reached, step)
    if stuck < PREEMPTIONS_WITHOUT_PROGRESS:
        return Restart()
    return GiveUp(
        f"preempted {stuck} times in a row without a new step: {failure}",
        "nodes go sooner than a step is saved: checkpoint more often, or use nodes that stay",
    )


def _same(one: Failure, other: Failure) -> bool:
    return (one.kind, one.step, _plain(one.text)) == (other.kind, other.step, _plain(other.text))


def _plain(text: str) -> str:
    """An error's text without what differs from process to process: addresses in memory, process ids."""
    return re.sub(r"0x[0-9a-f]+|\bpid[= ]\d+", "", text)

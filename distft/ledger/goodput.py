"""Where a run's time went: goodput and its parts, from ``metrics.jsonl`` alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

#: The first event of each attempt.
BEGINNINGS = frozenset({"start", "resume", "restart", "resize"})
#: Events that workers write as they train. Others are the driver's, about workers that may be gone.
SIGNS_OF_LIFE = BEGINNINGS | {"best", "checkpoint", "checkpoint_failed", "finished", "interrupted", "skipped"}
PARTS = ("compute", "data_wait", "validation", "checkpoint", "replay", "restart", "startup", "idle")


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they were spent on; the parts add up to ``wall``.

    Attributes:
        wall: From the start of the first attempt to the last line; a pause that somebody asked for is left out.
        compute: Steps whose line stands, less their wait for data.
        data_wait: The part of those steps in which rows were read and put together.
        validation: Scoring the validation split, where the line stands.
        checkpoint: What saving held training up; what is written beside the steps costs nothing here.
        replay: Steps and validations that were done again later.
        restart: From the last sign of life of an attempt to the first step of the next, all start-up included.
        startup: From the start of the first attempt to its first step, and so after a pause.
        idle: The rest of the time that workers were up: between steps, and saves that no checkpoint came of.
        attempts: Times that workers began.
    """

    wall: float
    compute: float
    data_wait: float
    validation: float
    checkpoint: float
    replay: float
    restart: float
    startup: float
    idle: float
    attempts: int

    @property
    def share(self) -> float:
        """Goodput: useful step time over wall time, 0 where there is no time."""
        return self.compute / self.wall if self.wall > 0 else 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {name: getattr(self, name) for name in PARTS}


def goodput(records: Iterable[Record]) -> Goodput:
    """Divides a run's wall time.

    Steps, validations and checkpoints say themselves how long they took; an attempt's first event says how long ago
    the driver began it; what lies between two attempts is told by the last line of the one and the first step of the
    other. ``idle`` is what is left of an attempt, so the parts make up the whole only where those times are true.

    Args:
        records: The lines of ``metrics.jsonl``, in order.
    """
    lines = list(records)
    if not lines:
        return Goodput(wall=0.0, attempts=0, **dict.fromkeys(PARTS, 0.0))
    last_doing = {(line["kind"], line["step"]): number for number, line in enumerate(lines)}
    stands = [last_doing[line["kind"], line["step"]] == number for number, line in enumerate(lines)]
    attempts = _attempts(lines)
    parts = dict.fromkeys(PARTS, 0.0)
    wall, end, paused = 0.0, _began(lines[0]), False
    for first, after in attempts:
        if paused:
            end = max(end, _began(lines[first]))
        anew = first == 0 or (paused and lines[first].get("event") == "resume")
        spent, now = _divide(lines[first:after], stands[first:after], end, "startup" if anew else "restart")
        parts = {name: parts[name] + spent[name] for name in PARTS}
        wall, end = wall + now["time"] - end, now["time"]
        paused = now.get("event") == "interrupted"
    tail = lines[-1]["time"] - end  # a failure that nothing came after
    parts["restart"] += tail
    return Goodput(wall=wall + tail, attempts=len(attempts), **parts)


def _attempts(lines: Sequence[Record]) -> list[tuple[int, int]]:
    """Where each attempt's lines begin and end."""
    first = [number for number, line in enumerate(lines) if number == 0 or line.get("event") in BEGINNINGS]
    return list(zip(first, [*first[1:], len(lines)], strict=True))


def _began(line: Record) -> float:
    """When the driver began the attempt whose first line this is."""
    time: float = line["time"]
    return time - (line.get("seconds", 0.0) if line["kind"] == "event" else 0.0)


def _divide(
    attempt: Sequence[Record], stands: Sequence[bool], since: float, lead_in: str
) -> tuple[dict[str, float], Record]:
    """The parts of the time from ``since`` to an attempt's last sign of life, and that line."""
    alive = [line for line in attempt if line["kind"] != "event" or line["event"] in SIGNS_OF_LIFE]
    last = alive[-1] if alive else attempt[0]
    first = next((number for number, line in enumerate(attempt) if line["kind"] == "train"), len(attempt))
    ready = attempt[first]["time"] - attempt[first]["step_seconds"] if first < len(attempt) else last["time"]
    before = _sums(attempt[:first], stands[:first])
    during = _sums(attempt[first:], stands[first:])
    spent = {name: before[name] + during[name] for name in PARTS}
    spent[lead_in] += max(0.0, ready - since - sum(before.values()))
    spent["idle"] += max(0.0, last["time"] - ready - sum(during.values()))
    return spent, last


def _sums(lines: Sequence[Record], stands: Sequence[bool]) -> dict[str, float]:
    """What lines say of the time that went before them, by part."""
    spent = dict.fromkeys(PARTS, 0.0)
    for line, standing in zip(lines, stands, strict=True):
        if line["kind"] == "train":
            waited = line.get("data_seconds", 0.0) if standing else 0.0
            spent["data_wait"] += waited
            spent["compute" if standing else "replay"] += line["step_seconds"] - waited
        elif line["kind"] == "validation":
            spent["validation" if standing else "replay"] += line["seconds"]
        elif line["event"] == "checkpoint":
            spent["checkpoint"] += line.get("blocking_seconds", 0.0)
    return spent

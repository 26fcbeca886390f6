"""A job's whole plan: every ZeRO stage and offload with what it takes, what comes of it, and which one is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distft.config import Job
from distft.plan.calibration import Correction, Observation, correction, kind_of
from distft.plan.choices import Choices
from distft.plan.fit import Room, Subject, Way, setup_of, smallest, ways
from distft.plan.hardware import Hardware
from distft.plan.memory import memory
from distft.plan.setup import Setup
from distft.plan.speed import Rates, StepTime, step_time


@dataclass(frozen=True)
class Workload:
    """How much there is to train on.

    Attributes:
        steps: Of the run; None: not known before the data is prepared.
        tokens: Of the run, without padding.
        fill: The share of rows that is no padding.
        attended_tokens: The mean length of the segment that a token lies in.
        source: Where that is known from.
    """

    steps: int | None
    tokens: int | None
    fill: float
    attended_tokens: int
    source: str

    @classmethod
    def of(cls, job: Job, rows: int | None, tokens: int | None, attended_tokens: int | None = None) -> Workload:
        """From what is known of the prepared training split, where it is prepared."""
        train, length = job.train, job.data.max_tokens
        attended = attended_tokens or length
        if rows:
            fill = min(1.0, (tokens or 0) / (rows * length))
            total = train.steps * train.batch_size if train.steps else math.ceil((train.epochs or 1) * rows)
            return cls(-(-total // train.batch_size), round(total * length * fill), fill, attended, "prepared data")
        if train.steps:
            tokens = train.steps * train.batch_size * length
            return cls(train.steps, tokens, 1.0, attended, "train.steps, rows taken as full")
        if job.data.limit:
            total = math.ceil((train.epochs or 1) * job.data.limit)
            steps = -(-total // train.batch_size)
            return cls(steps, total * length, 1.0, attended, "data.limit, at most, rows taken as full")
        return cls(None, None, 1.0, attended, "not known before the data is prepared: distft prepare")


@dataclass(frozen=True)
class Estimate:
    """One way of running the job, and what comes of it.

    Attributes:
        way: It, and its memory.
        time: Of a step, without correction.
        correction: What this cluster's runs taught.
        fits: Whether it fits, with the reserve.
        chosen: Whether the job is run so.
        workload: What there is to do.
        price: Of one device for an hour; None: not given.
    """

    way: Way
    time: StepTime
    correction: Correction
    fits: bool
    chosen: bool
    workload: Workload
    price: float | None

    @property
    def setup(self) -> Setup:
        """How."""
        return self.way.setup

    @property
    def device_bytes(self) -> int:
        """Peak memory of a rank, corrected."""
        memory = self.way.memory
        return round(self.correction.bytes(memory.device_bytes, memory.parts.get("process", 0)))

    @property
    def step_seconds(self) -> float:
        """Corrected."""
        return self.time.seconds * self.correction.seconds

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.setup.step_tokens / self.step_seconds

    @property
    def hours(self) -> float | None:
        """Of all steps; validation, saving and starting are not in it."""
        return None if self.workload.steps is None else self.workload.steps * self.step_seconds / 3600

    @property
    def money(self) -> float | None:
        """What the devices cost for so long."""
        return None if self.price is None or self.hours is None else self.hours * self.price * self.setup.workers

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        setup, memory = self.setup, self.way.memory
        return {
            "stage": setup.stage,
            "offload": setup.offload,
            "activation_checkpointing": setup.checkpointing,
            "micro_batch_size": setup.micro_batch_size,
            "accumulation": setup.passes,
            "fits": self.fits,
            "chosen": self.chosen,
            "device_bytes": self.device_bytes,
            "peak_moment": memory.peak,
            "memory": {moment: dict(parts) for moment, parts in memory.moments.items()},
            "host_bytes": memory.host_bytes,
            "host": dict(memory.host),
            "checkpoint_bytes": memory.checkpoint_bytes,
            "sent_bytes_per_step": round(self.time.sent_bytes),
            "step_seconds": self.step_seconds,
            "seconds": {
                "compute": self.time.compute,
                "handling": self.time.handling,
                "update": self.time.update,
                "sending": self.time.sending,
                "waiting": self.time.waiting,
            },
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "money": self.money,
        }


def estimate(
    subject: Subject, way: Way, rates: Rates, room: Room | None, seen: Sequence[Observation], workload: Workload
) -> Estimate:
    """What comes of one way, after what this cluster's runs taught."""
    time = step_time(subject.shape, subject.trained, way.setup, rates)
    fits = room is None or room.holds(way.memory)
    learnt = correction(seen, kind_of(subject.trained, subject.shape.parameters, way.setup))
    return Estimate(way, time, learnt, fits, False, workload, None)


def first_setup(job: Job, hardware: Hardware, choices: Choices, nodes: int) -> Setup:
    """The setup of what was decided."""
    setup = setup_of(
        job,
        hardware,
        choices.batch,
        dtype=choices.dtype.value,
        stage=choices.stage.value,
        nodes=nodes,
        hpz=choices.hpz.value,
    )
    return replace(
        setup,
        offload=choices.offload.value,
        checkpointing=choices.activation_checkpointing.value,
        compiled=choices.compile.value,
    )


def alternatives(job: Job, subject: Subject, chosen: Setup, room: Room | None) -> list[Way]:
    """For each ZeRO stage and offload the cheapest way that fits, else the smallest."""
    found = []
    offloads = ("none", "cpu") if chosen.device_type == "cuda" else ("none",)
    for stage in range(4):
        for offload in offloads:
            if (offload == "cpu" and stage == 0) or (subject.quantised and stage == 3):
                continue  # offloading is ZeRO's; DeepSpeed cannot split four-bit weights
            if (stage, offload) == (chosen.stage, chosen.offload):
                found.append(Way(chosen, memory(subject.shape, subject.trained, chosen)))
                continue
            open_ways = list(ways(_at_stage(job), subject, replace(chosen, stage=stage, offload=offload)))
            fitting = (way for way in open_ways if room is None or room.holds(way.memory))
            found.append(next(fitting, smallest(open_ways)))
    return found


def _at_stage(job: Job) -> Job:
    """With stage and offload decided."""
    return job.model_copy(update={"zero": job.zero.model_copy(update={"stage": 0, "offload": "none"})})


def whole_plan(
    job: Job,
    subject: Subject,
    chosen: Setup,
    rates: Rates,
    room: Room | None,
    *,
    seen: Sequence[Observation],
    workload: Workload,
    price: float | None = None,
) -> list[Estimate]:
    """The alternatives with what comes of each, the chosen one marked."""
    made = []
    for way in alternatives(job, subject, chosen, room):
        filled = Way(replace(way.setup, fill=workload.fill, attended_tokens=workload.attended_tokens), way.memory)
        one = estimate(subject, filled, rates, room, seen, workload)
        is_chosen = way.setup == chosen
        made.append(replace(one, chosen=is_chosen, fits=one.fits or is_chosen, price=price))
    return made

"""Whether a job fits, and how: the ways of running it, cheapest in time first, held against a device's memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distft.config import Job
from distft.config.sections import AdapterSection
from distft.config.values import amount
from distft.errors import CapacityError
from distft.model.shape import Shape
from distft.plan.batch import BatchPlan
from distft.plan.hardware import Hardware
from distft.plan.memory import PROCESS_BYTES, Memory, memory
from distft.plan.setup import Setup

#: The share of a device's memory that is planned with. The rest is the driver's, the collectives' and what the
#: allocator cannot use: about 1 GB, and some percent, of a GPU; of a machine, what its other processes hold.
USED = {"cuda": 0.92, "cpu": 0.90}

#: Shorter rows than this are not proposed.
LEAST_ROW = 256


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        shape: The model, with the head that its task gives it.
        trained: Its trained parameters.
        quantised: Whether the others are in four bits.
    """

    shape: Shape
    trained: int
    quantised: bool

    @classmethod
    def of(cls, job: Job, shape: Shape, labels: int = 2) -> Subject:
        """What a job trains of a model; ``labels`` counts where the job does not name a classifier's labels."""
        if job.task.kind == "classification":
            shape = shape.as_classifier(len(job.task.labels or ()) or labels)
        adapter = job.model.adapter
        return cls(shape, shape.trained(adapter), adapter is not None and adapter.quantize is not None)


@dataclass(frozen=True)
class Way:
    """One way of running the job, and what it takes.

    Attributes:
        setup: How.
        memory: Bytes.
    """

    setup: Setup
    memory: Memory


@dataclass(frozen=True)
class Room:
    """What one worker may take.

    Attributes:
        device_bytes: Of its device: planned with.
        total_bytes: All that there is for it.
        host_bytes: Of its machine's memory; None: unknown.
    """

    device_bytes: int
    total_bytes: int
    host_bytes: int | None

    @classmethod
    def of(cls, hardware: Hardware, workers_per_node: int) -> Room | None:
        """The share of each of the workers on a machine; None where its memory is unknown."""
        if hardware.memory_bytes is None:
            return None
        if hardware.device_type == "cpu":
            share = hardware.memory_bytes // workers_per_node
            return cls(int(USED["cpu"] * share), share, None)
        host = None if hardware.host_bytes is None else hardware.host_bytes // workers_per_node
        return cls(int(USED["cuda"] * hardware.memory_bytes), hardware.memory_bytes, host)

    def holds(self, need: Memory) -> bool:
        """With the reserve."""
        return need.device_bytes <= self.device_bytes and (
            self.host_bytes is None or need.host_bytes <= self.host_bytes
        )

    def might_hold(self, need: Memory) -> bool:
        """Without it: what does not even fit then is refused."""
        return need.device_bytes <= self.total_bytes and (self.host_bytes is None or need.host_bytes <= self.host_bytes)


def setup_of(job: Job, hardware: Hardware, batch: BatchPlan, *, dtype: str, stage: int, nodes: int, hpz: int) -> Setup:
    """The job's way of running it, with what is decided already; activations are kept unless the job says otherwise."""
    adapter = job.model.adapter
    return Setup(
        device_type=hardware.device_type,
        dtype=dtype,
        stage=stage,
        offload="none" if job.zero.offload == "auto" else job.zero.offload,
        checkpointing=job.train.activation_checkpointing is True,
        workers=batch.world_size,
        nodes=nodes,
        batch_size=batch.batch_size,
        micro_batch_size=batch.micro_batch_size,
        row_tokens=job.data.max_tokens,
        attended_tokens=job.data.max_tokens,
        masked=job.data.packing and hardware.device_type != "cpu" and dtype == "fp32",
        quantised=adapter is not None and adapter.quantize is not None,
        hpz=hpz,
        sharing=batch.sequence_parallel_size,
    )


def ways(job: Job, subject: Subject, first: Setup, process_bytes: int = PROCESS_BYTES) -> Iterator[Way]:
    """The ways that the job leaves open, cheapest in time first, beginning with ``first``.

    A smaller micro-batch costs least, then splitting gradients between workers (they are sent in every pass then), then
    weights (half as much traffic again; more between nodes without a second copy), then computing activations twice (a
    third more arithmetic), then an update by the host's processor.
    """
    open_stage = job.zero.stage == "auto" and first.workers > 1 and first.stage < 3 and not subject.quantised
    open_checkpointing = job.train.activation_checkpointing == "auto"
    open_hpz = job.zero.hpz_partition_size == "auto" and first.hpz > 1
    open_offload = job.zero.offload == "auto" and first.device_type == "cuda" and first.offload == "none"
    for offload, checkpointing, stage, hpz, size in itertools.product(
        ("none", "cpu") if open_offload else (first.offload,),
        (first.checkpointing, True) if open_checkpointing else (first.checkpointing,),
        range(first.stage, 4) if open_stage else (first.stage,),
        (first.hpz, 1) if open_hpz else (first.hpz,),
        _halved(first.micro_batch_size) if job.train.micro_batch_size == "auto" else (first.micro_batch_size,),
    ):
        if stage < 3 and hpz != first.hpz:
            continue  # it is nothing there
        if offload == "cpu" and stage == 0:
            if job.zero.stage != "auto":
                continue  # asked for: nothing is split that could be kept elsewhere
            stage = 1
        setup = replace(
            first, offload=offload, checkpointing=checkpointing, stage=stage, micro_batch_size=size, hpz=hpz
        )
        yield Way(setup, memory(subject.shape, subject.trained, setup, process_bytes))


def _halved(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def smallest(found: Sequence[Way]) -> Way:
    """The one that takes least on the device; of equal ones the first."""
    return min(found, key=lambda way: way.memory.device_bytes)


def choose_way(job: Job, subject: Subject, first: Setup, room: Room) -> Way:
    """The first way that fits; where none does with the reserve, the smallest.

    Raises:
        CapacityError: None fits even without the reserve; with figures, and what would fit.
    """
    found = list(ways(job, subject, first))
    for way in found:
        if room.holds(way.memory):
            return way
    least = smallest(found)
    if room.might_hold(least.memory):
        return least
    raise refusal(job, subject, least, room)


def refusal(job: Job, subject: Subject, least: Way, room: Room) -> CapacityError:
    """Why even the smallest way does not fit, and what would."""
    need = least.memory
    large = sorted(need.parts.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {amount(size)}" for name, size in large)
    if need.device_bytes > room.total_bytes:
        device = "memory" if least.setup.device_type == "cpu" else "device memory"
        what = f"needs {amount(need.device_bytes)} of {device} a worker and has {amount(room.total_bytes)} ({parts})"
    else:
        has = amount(room.host_bytes or 0)
        what = f"needs {amount(need.host_bytes)} of its machine's memory a worker, which has {has}"
    return CapacityError(
        f"the job cannot fit: with {describe(least.setup)} it {what}",
        where="plan",
        fix=_advice(job, subject, least.setup, room),
    )


def describe(setup: Setup) -> str:
    """``ZeRO 2 on 4 workers, micro-batch 1, activations computed again``."""
    parts = [f"ZeRO {setup.stage} on {setup.workers} worker{'' if setup.workers == 1 else 's'}"]
    parts.append(f"micro-batch {setup.micro_batch_size}")
    parts += [f"rows shared by {setup.sharing}"] if setup.sharing > 1 else []
    parts += [f"weights once more in each {setup.hpz}"] if setup.stage == 3 and setup.hpz > 1 else []
    parts += ["optimizer in host memory"] if setup.offload == "cpu" else []
    parts += ["activations computed again"] if setup.checkpointing else []
    return ", ".join(parts)


def _advice(job: Job, subject: Subject, least: Setup, room: Room) -> str:
    """What would make it fit: each mild change that is enough alone, else all of them together; more workers; LoRA."""

    def fits(setup: Setup, trained: int = subject.trained) -> bool:
        return room.might_hold(memory(subject.shape, trained, setup))

    mild: list[tuple[str, dict[str, Any]]] = [
        ("train.micro_batch_size: 1", {"micro_batch_size": 1}),
        ("train.activation_checkpointing: true", {"checkpointing": True}),
    ]
    if least.workers > 1 and not subject.quantised:
        mild.append(("zero.stage: 3", {"stage": 3}))
    if least.stage == 3:
        mild.append(("zero.hpz_partition_size: 1", {"hpz": 1}))
    if sharing := _most_sharing(job, subject, least):
        mild.append((f"train.sequence_parallel_size: {sharing}", {"sharing": sharing}))
    if least.device_type == "cuda":
        mild.append(("zero.offload: cpu", {"offload": "cpu", "stage": max(least.stage, 1)}))
    mild = [(said, changes) for said, changes in mild if replace(least, **changes) != least]
    found = [said for said, changes in mild if fits(replace(least, **changes))]
    together = least
    names: list[str] = []
    for said, changes in mild:
        together, names = replace(together, **changes), [*names, said]
        if not found and fits(together):
            found.append(", ".join(names) + " (together)")
    # All but what that advice does not name.
    wider = replace(together, offload=least.offload, hpz=least.hpz, sharing=least.sharing)
    found += _more_workers(subject, wider, room)
    if job.model.adapter is None:
        adapted = subject.shape.trained(AdapterSection(kind="lora"))
        saving = [said for said, changes in mild if changes.keys() <= {"micro_batch_size", "checkpointing"}]
        if fits(least, adapted):
            found.append("model.adapter: {kind: lora}")
        elif saving and fits(replace(least, micro_batch_size=1, checkpointing=True), adapted):
            found.append(f"model.adapter: {{kind: lora}} with {' and '.join(saving)}")
    half = least.row_tokens // 2
    if half >= LEAST_ROW and fits(replace(least, row_tokens=half, attended_tokens=half)):
        found.append(f"data.max_tokens: {half}")
    return f"what would fit: {'; or '.join(found)}" if found else "it needs a smaller model, or larger devices"


def _most_sharing(job: Job, subject: Subject, least: Setup) -> int:
    """The most workers that could share rows; 0 where none could."""
    adapter, shape = job.model.adapter, subject.shape
    if (adapter is not None and adapter.dropout > 0) or job.train.compile is True:
        return 0  # refused together
    sizes = range(2, least.workers + 1)
    return max((size for size in sizes if least.workers % size == 0 and shape.heads_divide(size)), default=0)


def _more_workers(subject: Subject, least: Setup, room: Room) -> list[str]:
    """How many workers would be enough at the stage that splits most, with all that saves memory besides."""
    stage = 2 if subject.quantised else 3
    for power in range(1, 12):
        wider = replace(least, workers=2**power, stage=stage, micro_batch_size=1, checkpointing=True)
        if wider.workers > least.workers and room.might_hold(memory(subject.shape, subject.trained, wider)):
            # Workers of a machine share its memory: on a CPU more of them help on more machines only.
            each = ", on machines of their own like these" if least.device_type == "cpu" else ""
            saving = f"zero.stage: {stage}, train.micro_batch_size: 1 and train.activation_checkpointing: true"
            return [f"cluster.workers: {wider.workers}{each}, with {saving}"]
    return []

"""What the job leaves to ``auto``, decided from facts, each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from distft.config import Job
from distft.config.values import amount
from distft.errors import JobError
from distft.model.shape import Shape
from distft.plan.batch import BatchPlan
from distft.plan.devices import known
from distft.plan.fit import Room, Subject, choose_way, setup_of, ways
from distft.plan.hardware import Hardware
from distft.plan.setup import Setup
from distft.plan.speed import EFFICIENCY, Rates, flops_per_token, gathers, step_time

T = TypeVar("T")

#: Runs whose passes take so long are compiled. Steps of SmolLM2-135M in bf16 are shorter by a twentieth, take a tenth
#: less memory, and compiling takes 30 s at each start (benchmarks/baselines/step-profile.json, peers-packed-bf16.json).
COMPILED_FROM_SECONDS = 900.0

#: Operations a second that training reaches on one core, by steps of SmolLM2-135M in benchmarks/baselines/: in bf16
#: where that is fast (peers-packed-bf16.json), in fp32 with AVX-512 (peers-packed-fp32.json) and without
#: (peers-before-segments-fp32.json). Constants, so that each start of a run comes to the same.
CPU_FLOPS = {"bf16": 110e9, "wide": 90e9, "narrow": 45e9}

#: The share of a step that ZeRO 1 must save over 2, for the gradients that each rank keeps whole.
STAGE_1_FROM = 0.03


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A setting as it will be used, and why."""

    value: T
    reason: str


@dataclass(frozen=True)
class Choices:
    """All of them, for one job on one number of workers."""

    dtype: Choice[str]
    stage: Choice[int]
    offload: Choice[str]
    activation_checkpointing: Choice[bool]
    compile: Choice[bool]
    batch: BatchPlan
    hpz: Choice[int] = Choice(1, "set in the job")
    sequence_parallel: Choice[int] = Choice(1, "set in the job")
    threads: Choice[int] | None = None

    def record(self) -> dict[str, dict[str, Any]]:
        """Value and reason by the job's dotted names, for ``resolved.json``."""
        choices: dict[str, Choice[Any]] = {
            "model.dtype": self.dtype,
            "zero.stage": self.stage,
            "zero.offload": self.offload,
            "train.activation_checkpointing": self.activation_checkpointing,
            "train.compile": self.compile,
            "train.micro_batch_size": Choice(self.batch.micro_batch_size, self.batch.reason),
        }
        if self.sequence_parallel != Choice(1, "set in the job"):
            choices["train.sequence_parallel_size"] = self.sequence_parallel
        if self.stage.value == 3:
            choices["zero.hpz_partition_size"] = self.hpz
        elif self.hpz.value > 1:
            reason = f"at stage {self.stage.value} every worker has all weights"
            choices["zero.hpz_partition_size"] = Choice(1, reason)
        if self.threads is not None:
            choices["cluster.resources_per_worker.CPU"] = self.threads
        return {key: {"value": choice.value, "reason": choice.reason} for key, choice in choices.items()}


def choose(
    job: Job,
    world_size: int,
    hardware: Hardware,
    *,
    most_workers: int | None = None,
    micro_batch_limit: int | None = None,
    shape: Shape | None = None,
    workers_per_node: int = 1,
    run_tokens: int | None = None,
    compiler: bool = True,
) -> Choices:
    """Decides everything that the job leaves open: a function of its arguments, so that it comes out the same again.

    Args:
        job: The job.
        world_size: Number of workers.
        hardware: What one of them has.
        most_workers: See :meth:`BatchPlan.solve`.
        micro_batch_limit: See :meth:`BatchPlan.solve`.
        shape: The model; None: it is not known whether it fits.
        workers_per_node: How many workers share a machine.
        run_tokens: Tokens that the whole run trains on; None: not known.
        compiler: Whether there is a C++ compiler.

    Raises:
        JobError: A setting cannot be used.
        CapacityError: The job does not fit, whatever is left open.
    """
    sharing = choose_sequence_parallel(job.train.sequence_parallel_size, world_size, shape)
    batch = BatchPlan.solve(
        job.train.batch_size,
        world_size,
        job.train.micro_batch_size,
        job.data.max_tokens,
        hardware.device_type,
        sequence_parallel_size=sharing.value,
        most_workers=most_workers,
        micro_batch_limit=micro_batch_limit,
    )
    first = Choices(
        choose_dtype(job.model.dtype, hardware),
        choose_stage(job.zero.stage, world_size, job.zero.offload),
        choose_offload(job.zero.offload, hardware),
        choose_activation_checkpointing(job.train.activation_checkpointing),
        Choice(False, "not decided yet"),
        batch,
        choose_hpz(job.zero.hpz_partition_size, world_size, workers_per_node),
        sharing,
    )
    seconds = None
    if shape is not None:
        subject = Subject.of(job, shape)
        setup = setup_of(
            job,
            hardware,
            batch,
            dtype=first.dtype.value,
            stage=first.stage.value,
            nodes=-(-world_size // workers_per_node),
            hpz=first.hpz.value,
        )
        first = replace(first, hpz=_of_use(first.hpz, job, subject, setup))
        setup = replace(setup, hpz=first.hpz.value)
        if job.zero.stage == "auto" and micro_batch_limit is None:  # where memory ran out, nothing takes more of it
            first = replace(first, stage=_quicker(first.stage, job, subject, setup, hardware))
        if (room := Room.of(hardware, workers_per_node)) is not None:
            first = _fitted(first, job, subject, replace(setup, stage=first.stage.value), room)
        if run_tokens is not None:
            flops = run_tokens * flops_per_token(subject.shape, subject.trained, job.data.max_tokens)
            seconds = flops / (world_size * _flops(job, hardware, first.dtype.value))
    compiled = choose_compile(job, hardware, first.stage.value, seconds, compiler=compiler)
    return replace(first, compile=compiled, threads=threads_of(job, hardware, min(workers_per_node, world_size)))


def _of_use(hpz: Choice[int], job: Job, subject: Subject, setup: Setup) -> Choice[int]:
    """A second copy of the weights, unless it was left open and nothing would be fetched from it."""
    if job.zero.hpz_partition_size == "auto" and hpz.value > 1 and gathers(subject.shape, setup) == 1:
        return Choice(1, "a step gathers the weights once")
    return hpz


def _quicker(stage: Choice[int], job: Job, subject: Subject, setup: Setup, hardware: Hardware) -> Choice[int]:
    """ZeRO 1 in place of 2 where a step is much shorter: it sends gradients once, not in every pass.

    On a GPU that this knows nothing of it stays 2.
    """
    if stage.value != 2 or setup.passes == 1 or setup.offload != "none":
        return stage
    if hardware.device_type == "cpu":
        peak = _flops(job, hardware, setup.dtype) / EFFICIENCY["cpu"]
        rates = Rates.of_cpu(peak, hardware.at_once(job.cluster.threads))
    elif (device := known(hardware.name)) is not None:
        rates = Rates.of(device, setup.dtype)
    else:
        return stage
    one, two = (step_time(subject.shape, subject.trained, replace(setup, stage=each), rates).seconds for each in (1, 2))
    if one > (1 - STAGE_1_FROM) * two:
        return stage
    return Choice(1, f"gradients are sent once a step, not in each of its {setup.passes} passes as at stage 2")


def _fitted(first: Choices, job: Job, subject: Subject, setup: Setup, room: Room) -> Choices:
    """What was decided without looking at memory, changed where that does not fit.

    Raises:
        CapacityError: Nothing fits.
    """
    way = choose_way(job, subject, setup, room)
    wanted = next(ways(job, subject, setup)).memory.device_bytes
    told = f"{amount(way.memory.device_bytes)} of {amount(room.total_bytes)} a worker; {amount(wanted)} without it"
    checkpointing, stage, offload, batch = first.activation_checkpointing, first.stage, first.offload, first.batch
    hpz = first.hpz
    if way.setup.checkpointing != checkpointing.value:
        checkpointing = Choice(way.setup.checkpointing, f"memory: {told}")
    if way.setup.stage != stage.value:
        stage = Choice(way.setup.stage, f"memory: {told}")
    if way.setup.offload != offload.value:
        offload = Choice(way.setup.offload, f"memory: {told}")
    if way.setup.hpz != hpz.value:
        hpz = Choice(way.setup.hpz, f"memory: {told}")
    if way.setup.micro_batch_size != batch.micro_batch_size:
        size = way.setup.micro_batch_size
        batch = replace(batch, micro_batch_size=size, reason=f"{batch.reason}; {size} to fit into memory: {told}")
    return replace(first, stage=stage, offload=offload, activation_checkpointing=checkpointing, batch=batch, hpz=hpz)


def choose_dtype(asked: str, hardware: Hardware) -> Choice[str]:
    """The type of weights and activations: bf16 where the device is fast at it, else fp32.

    Returns:
        ``bf16`` or ``fp32``.

    Raises:
        JobError: The type is not built yet.
    """
    if asked == "auto":
        if hardware.fast_bf16:
            return Choice("bf16", f"{hardware.name} multiplies bf16 in hardware")
        return Choice("fp32", f"{hardware.name} multiplies bf16 no faster than fp32")
    if asked not in ("bf16", "fp32"):
        raise JobError(f"{asked} is not built yet", where="model.dtype", fix="use bf16, fp32 or auto")
    return Choice(asked, "set in the job")


def choose_stage(asked: int | Literal["auto"], world_size: int, offload: str = "none") -> Choice[int]:
    """The ZeRO stage: what is split between workers."""
    if asked != "auto":
        return Choice(asked, "set in the job")
    if world_size == 1 and offload == "cpu":
        return Choice(1, "one worker has nobody to share with, but offloading is ZeRO's")
    if world_size == 1:
        return Choice(0, "one worker has nobody to share with")
    return Choice(2, f"optimizer state and gradients split between {world_size} workers")


def choose_offload(asked: str, hardware: Hardware) -> Choice[str]:
    """Where the optimizer's state is kept, before memory is looked at."""
    if asked != "auto":
        return Choice(asked, "set in the job")
    if hardware.device_type == "cpu":
        return Choice("none", "host memory is a CPU's own")
    return Choice("none", "it fits on the device")


def choose_hpz(asked: int | Literal["auto"], world_size: int, workers_per_node: int) -> Choice[int]:
    """Workers that hold the weights once more between them, before time and memory are looked at."""
    if asked == 1:
        return Choice(1, "set in the job")
    size = workers_per_node if asked == "auto" else asked
    if asked == "auto" and size >= world_size:
        return Choice(1, "all workers are on one node")
    if size == 1:
        return Choice(1, "each worker is on a node of its own")
    if world_size % size:
        return Choice(1, f"{world_size} workers cannot be divided into groups of {size}")
    if size == world_size:
        return Choice(1, "these are all workers, over which the weights are split in any case")
    return Choice(size, "the workers of a node" if asked == "auto" else "set in the job")


def choose_sequence_parallel(asked: int, world_size: int, shape: Shape | None) -> Choice[int]:
    """Workers that share rows; fewer than the job asks for on a number of workers that cannot be divided so.

    Raises:
        JobError: The model's heads cannot be divided so.
    """
    usable = [size for size in range(1, asked + 1) if asked % size == 0 and (not shape or shape.heads_divide(size))]
    if shape is not None and asked not in usable:
        possible = [str(size) for size in range(2, shape.heads + 1) if shape.heads_divide(size)]
        heads = f"{shape.heads} attention heads, {shape.kv_heads} of keys,"
        raise JobError(
            f"the model's {heads} cannot be divided between {asked} workers",
            where="train.sequence_parallel_size",
            fix=f"choose {', '.join(possible)} or remove it" if possible else "remove it",
        )
    size = max(size for size in usable if world_size % size == 0)
    if size < asked:
        return Choice(size, f"{world_size} workers cannot be divided into groups of {asked}")
    return Choice(size, "set in the job")


def choose_compile(
    job: Job, hardware: Hardware, stage: int, compute_seconds: float | None, *, compiler: bool
) -> Choice[bool]:
    """Whether layers are compiled: where that wins over the whole run.

    Args:
        job: The job.
        hardware: A worker's.
        stage: ZeRO's.
        compute_seconds: About how long the run's passes take; None: not known.
        compiler: Whether there is a C++ compiler.

    Raises:
        JobError: The job asks for it, and it cannot be.
    """
    asked, adapter = job.train.compile, job.model.adapter
    if asked is False:
        return Choice(False, "set in the job")
    obstacle = None
    if job.train.sequence_parallel_size > 1:
        obstacle = "the exchange between workers that share rows cannot be compiled with a layer"
    elif stage == 3:
        obstacle = "ZeRO-3 gathers a layer's weights in hooks that a compiled layer does not call"
    elif adapter is not None and adapter.quantize is not None:
        obstacle = "four-bit matrices have kernels of their own"
    elif hardware.device_type == "cpu" and not compiler:
        obstacle = "torch.compile needs a C++ compiler (g++, or CXX)"
    if obstacle is not None and asked is True:
        raise JobError(obstacle, where="train.compile", fix="set train.compile: auto or false")
    if asked is True:
        return Choice(True, "set in the job")
    if obstacle is None and hardware.device_type != "cpu":
        obstacle = f"what it gains was not measured on {hardware.name}"
    if obstacle is None and not job.data.packing:
        obstacle = "rows are not packed: each length would be compiled"
    if obstacle is not None:
        return Choice(False, obstacle)
    if compute_seconds is None:
        return Choice(False, "how long the run is, is not known yet")
    told = f"about {compute_seconds / 60:,.0f} min of passes"
    if compute_seconds < COMPILED_FROM_SECONDS:
        return Choice(False, f"{told}: compiling would take what it saves")
    return Choice(True, f"{told}: compiling takes less than it saves")


def _flops(job: Job, hardware: Hardware, dtype: str) -> float:
    """Operations a second that training reaches on the CPUs of a worker."""
    kind = "bf16" if dtype == "bf16" and hardware.fast_bf16 else "wide" if hardware.wide else "narrow"
    return CPU_FLOPS[kind] * job.cluster.threads


def threads_of(job: Job, hardware: Hardware, workers_per_node: int) -> Choice[int] | None:
    """Threads that each worker computes with on a CPU, and whether that leaves cores idle; None on other devices."""
    if hardware.device_type != "cpu":
        return None
    threads = job.cluster.threads
    reason = "a thread for each CPU that a worker holds"
    possible = (hardware.cores or 0) // workers_per_node
    if possible > threads:
        reason += f"; with {possible} the workers would use all {hardware.cores} cores of this machine"
    elif hardware.cores and possible < threads:
        reason += f", more than the {hardware.cores} cores of this machine have room for"
    return Choice(threads, reason)


def choose_activation_checkpointing(asked: bool | Literal["auto"]) -> Choice[bool]:
    """Whether activations are computed again in the backward pass instead of kept."""
    if asked != "auto":
        return Choice(asked, "set in the job")
    return Choice(False, "a micro-batch of auto size fits without it")

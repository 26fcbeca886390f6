"""Seconds of a step: arithmetic, the update, and what ranks send one another.

Legend: N ranks, Q trained parameters, P all of them, s bytes of a weight, alpha seconds of latency of one message,
beta bytes a second of a link.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distft.model.shape import Shape
from distft.plan.devices import Device
from distft.plan.memory import BUCKET, LIVE, WHOLE_BUCKET
from distft.plan.setup import Setup

#: The share of its peak that a device reaches in a training step. GPU: the one figure with which the published tables
#: in ``benchmarks/published.py`` come out best; CPU: of forward and backward pass alone, see ``HANDLED``. Calibration
#: corrects both.
EFFICIENCY = {"cuda": 0.39, "cpu": 0.65}

#: Seconds of one message: within a node and between nodes. Usual figures of NCCL and InfiniBand, and of TCP.
LATENCY = {"cuda": (5e-6, 15e-6), "cpu": (50e-6, 200e-6)}

#: Bytes a second that gloo moves between processes of one machine, with the wait of one for another (1.6e9 without),
#: and over a network of 10 Gbit/s; and that a CPU moves to and from memory. What they are off by goes into the
#: calibration.
CPU_LINK, CPU_NETWORK, CPU_MEMORY = 1e9, 1.25e9, 10e9

#: Bytes that DeepSpeed moves on a CPU for each trained parameter and pass, by ZeRO stage, on one rank as on several (at
#: stage 0 on several only): it copies gradients to fp32, flattens, averages and adds them, and stage 3 gathers weights
#: in pieces besides. These, ``EFFICIENCY`` and ``CPU_LINK`` are the least squares of the logarithms of 29 steps of
#: SmolLM2-135M with bf16 (ZeRO 0 to 3, 1 and 2 ranks, 1 to 4 rows a pass of 256 to 1,024 tokens; two trainings of most
#: kinds, which differed by up to 30 %). On a GPU memory is so fast that the passes hide it.
HANDLED = (55, 50, 45, 150)

#: Bytes that a CPU moves for each byte that ranks which share rows exchange: heads and tokens change places before and
#: after. Between what two models took: 5 (``benchmarks/shared_rows.py``), and 17 (hidden 512, rows of 2,048 tokens).
TURNED = 10


@dataclass(frozen=True)
class Links:
    """The network between nodes, as it was measured: its slowest link and its longest way.

    Attributes:
        bytes_per_second: What arrives over one TCP connection.
        round_trip_seconds: Of one byte there and back.
    """

    bytes_per_second: float
    round_trip_seconds: float

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, Any]]) -> Links | None:
        """From ``network`` of ``environment.json``; None where nothing was measured."""
        if not measured:
            return None
        return cls(
            min(link["bytes_per_second"] for link in measured), max(link["round_trip_seconds"] for link in measured)
        )


@dataclass(frozen=True)
class Rates:
    """How fast a device computes and sends.

    Attributes:
        peak_flops: Operations a second at best.
        efficiency: The share of it that training reaches.
        memory_bandwidth: Bytes a second.
        link: Beta within a node.
        network: Beta between nodes, for one device.
        latency: Alpha within a node and between nodes.
        at_once: Workers of a node that compute at these rates at the same time; more of them take turns on its cores.
    """

    peak_flops: float
    efficiency: float
    memory_bandwidth: float
    link: float
    network: float
    latency: tuple[float, float]
    at_once: float = math.inf

    @classmethod
    def of(cls, device: Device, dtype: str = "bf16") -> Rates:
        """Of a device in the table."""
        peak = device.fp32_flops if dtype == "fp32" else device.bf16_flops
        return cls(peak, EFFICIENCY["cuda"], device.memory_bandwidth, device.link, device.network, LATENCY["cuda"])

    @classmethod
    def of_cpu(cls, peak_flops: float, at_once: float = math.inf) -> Rates:
        """Of a worker on a CPU whose matrix product was measured, where it has its cores for itself."""
        return cls(peak_flops, EFFICIENCY["cpu"], CPU_MEMORY, CPU_LINK, CPU_NETWORK, LATENCY["cpu"], at_once)

    def over(self, links: Links | None) -> Rates:
        """With the network between nodes as it was measured; as they are where it was not.

        A message takes half a round trip more than within a node. A ring crosses each node's network once each way,
        however many ranks are on the node.
        """
        if links is None:
            return self
        return replace(
            self,
            network=links.bytes_per_second,
            latency=(self.latency[0], self.latency[0] + links.round_trip_seconds / 2),
        )


@dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step.

    Attributes:
        ranks: N, those that take part, one after the other.
        rounds: How often the data goes around the ring: 2 for an all-reduce, 1 for all-gather and reduce-scatter.
        bytes: Of the whole tensor.
        times: How often in a step.
        messages: In how many pieces it is sent each time.
    """

    ranks: int
    rounds: int
    bytes: int
    times: int
    messages: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a step: ``rounds (N - 1) / N bytes``."""
        return self.times * self.rounds * (self.ranks - 1) / self.ranks * self.bytes

    def seconds(self, alpha: float, beta: float) -> float:
        """Of a ring: ``rounds (N - 1) (alpha messages + bytes / (N beta))``.

        Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH (2005), sections
        4.1 and 4.4: all-gather by ring, and all-reduce as reduce-scatter and all-gather.
        """
        turn = alpha * self.messages + self.bytes / (self.ranks * beta)
        return self.times * self.rounds * (self.ranks - 1) * turn


def collectives(shape: Shape, trained: int, setup: Setup, gradient_bytes: int = 4) -> list[Collective]:
    """What ranks exchange in a step.

    ZeRO (arXiv 1910.02054, section 7) moves 2 Q up to stage 2 and 3 Q at stage 3. DeepSpeed's stages 1 and 2 all-reduce
    gradients, and gather weights after the update; from stage 2 on it sends gradients after every pass, and stage 3
    gathers weights for every pass, once more for the backward pass where not all of them may stay. With gloo a
    reduce-scatter sends as much as an all-reduce, so that stage 3 moves 4 Q. Where groups of ranks hold the weights
    once more (ZeRO++, arXiv 2306.10209, section 3.2) only the first pass after an update gathers from all ranks, and
    that only what is trained.

    Args:
        shape: The model.
        trained: Parameters that are trained.
        setup: How.
        gradient_bytes: Of a gradient on its way: distft sends fp32.
    """
    if setup.workers == 1:
        return []
    ranks, gradients, weights = setup.workers, gradient_bytes * trained, setup.bytes * trained
    buckets = math.ceil(trained / (WHOLE_BUCKET if setup.stage == 0 else BUCKET[setup.device_type]))
    if setup.stage == 0:
        return [Collective(ranks, 2, gradients, 1, buckets)]
    if setup.stage < 3:
        times = setup.passes if setup.stage == 2 else 1
        return [Collective(ranks, 2, gradients, times, buckets), Collective(ranks, 1, weights, 1)]
    rounds = 2 if setup.device_type == "cpu" else 1
    scattered = Collective(ranks, rounds, gradients, setup.passes, buckets)
    every, times = setup.bytes * shape.parameters, gathers(shape, setup)
    if setup.hpz == 1:
        return [Collective(ranks, 1, every, times, shape.layers), scattered]
    first = Collective(ranks, 1, weights, 1, shape.layers)
    again = Collective(setup.hpz, 1, every, times - (1 if trained == shape.parameters else 0), shape.layers)
    return [first, again, scattered]


def gathers(shape: Shape, setup: Setup) -> int:
    """How often a step at stage 3 gathers the weights."""
    return (2 if shape.parameters > LIVE else 1) * setup.passes


def head_exchange(shape: Shape, setup: Setup) -> Collective:
    """What ranks that share rows exchange in a step: tokens for heads.

    For each layer queries, keys, values and what attention gives go from rank to rank and, as gradients, back
    (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.2); once more where activations are computed again. Of its bytes
    each rank keeps 1 / S, as in a ring.
    """
    heads = 2 * (shape.heads + max(shape.kv_heads, setup.sharing))
    width = setup.pass_tokens * heads * shape.head_size * setup.bytes
    times = setup.passes * (3 if setup.checkpointing else 2)
    return Collective(setup.sharing, 1, shape.layers * width, times, 4 * shape.layers)


def flops_per_token(shape: Shape, trained: int, attended_tokens: float) -> float:
    """FLOPs of forward and backward pass for one token, as :func:`distft.model.flops_per_token` counts a model's.

    ``6 N + 4 F + 12 L H Q T``: PaLM (arXiv 2204.02311), appendix B, with F frozen parameters; Chinchilla (arXiv
    2203.15556), appendix F, counts the same but for the softmax.
    """
    attention = 12 * shape.layers * shape.heads * shape.head_size * attended_tokens
    if trained == shape.parameters:
        return 6.0 * shape.multiplied + attention
    return 4.0 * shape.multiplied + 6.0 * trained + attention


def recomputed_flops_per_token(shape: Shape, attended_tokens: float) -> float:
    """FLOPs of the second forward pass that recomputing activations takes: of all layers, but not of the head."""
    head = shape.outputs * shape.hidden
    return 2.0 * (shape.multiplied - head) + 4 * shape.layers * shape.heads * shape.head_size * attended_tokens


@dataclass(frozen=True)
class StepTime:
    """The parts of a step, in seconds.

    Attributes:
        compute: Forward and backward passes.
        handling: What becomes of gradients after each pass, see ``HANDLED``, and of shared rows, see ``TURNED``.
        update: The optimizer.
        sending: All exchanges.
        waiting: The part of them that computing does not hide; what ranks that share rows exchange is never hidden.
        sent_bytes: What each rank sends.
    """

    compute: float
    handling: float
    update: float
    sending: float
    waiting: float
    sent_bytes: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.handling + self.update + self.waiting


def step_time(shape: Shape, trained: int, setup: Setup, rates: Rates, gradient_bytes: int = 4) -> StepTime:
    """How long a step takes.

    Arithmetic is what the rank with most rows does. The update is bound by memory: AdamW reads four fp32 numbers of
    each of its parameters, and writes three and the weight. On a GPU gradients are sent beside the backward pass (two
    thirds of the arithmetic), and ZeRO-3's weights beside both passes; on a CPU nothing is. Where a node has more
    workers than its cores compute for at once, they take turns; in the last pass only those that have rows left.
    """
    flops = flops_per_token(shape, trained, setup.attended_tokens)
    if setup.checkpointing:
        flops += recomputed_flops_per_token(shape, setup.attended_tokens)
    together = math.ceil(setup.workers / setup.nodes)
    turns = max(1.0, together / rates.at_once)
    last = max(1.0, min(together, setup.last_workers) / rates.at_once)
    of_passes = ((setup.passes - 1) * turns + last) / setup.passes
    compute = setup.rank_tokens * flops / (rates.peak_flops * rates.efficiency) * of_passes
    handles = setup.device_type == "cpu" and (setup.stage > 0 or setup.workers > 1)
    handled = HANDLED[setup.stage] * trained * setup.passes if handles else 0
    share = trained if setup.stage == 0 else math.ceil(trained / setup.workers)
    update = share * (28 + setup.bytes) / rates.memory_bandwidth
    exchanges = collectives(shape, trained, setup, gradient_bytes)
    sending = sum(_seconds(each, setup, rates) for each in exchanges)
    hidden = 0.0 if setup.device_type == "cpu" or setup.stage == 0 else compute * (1 if setup.stage == 3 else 2 / 3)
    heads = head_exchange(shape, setup)
    between = _seconds(heads, setup, rates)
    if setup.device_type == "cpu" and setup.sharing > 1:
        handled += TURNED * heads.bytes * heads.times
    return StepTime(
        compute,
        handled / rates.memory_bandwidth * turns,
        update * turns,
        sending + between,
        max(0.0, sending - hidden) + between,
        sum(each.sent for each in (*exchanges, heads)),
    )


def _seconds(each: Collective, setup: Setup, rates: Rates) -> float:
    """Of an exchange among ranks that follow one another, over the network unless they are all on one node."""
    if each.ranks <= setup.workers // setup.nodes:
        return each.seconds(rates.latency[0], rates.link)
    return each.seconds(rates.latency[1], min(rates.link, rates.network))

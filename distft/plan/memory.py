"""Bytes that training takes on each rank, by part, moment by moment.

Legend: P parameters, Q of them trained, N ranks, s bytes of a number (2 in bf16, 4 in fp32), D hidden, V vocabulary,
L layers, T tokens of a row, B rows of a pass.

What is kept of a parameter follows ZeRO (Rajbhandari et al., arXiv 1910.02054, section 3.1 and figure 1): in mixed
precision s P for weights, and 4 Q for each of fp32 weights, gradient and Adam's two moments. Where the published
formulas and DeepSpeed 0.19.8 part, this counts what DeepSpeed does with the settings of :mod:`distft.engine.zero`
(``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``bf16_optimizer.py``, ``fp16/unfused_optimizer.py``): fp32 copies of
fp32 weights where optimizer state is offloaded, gradients summed and sent in fp32, whole buckets of them at stages 0
to 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distft.model.chunk import chunk_tokens
from distft.model.shape import Shape
from distft.plan.setup import Setup

#: Elements of DeepSpeed's buffer for gradients on their way (``reduce_bucket_size``). On a GPU its own default, which
#: many of them want: each bucket is a message. On a CPU that is no faster, and takes 0.6 GB more of each rank for
#: SmolLM2-135M in bf16. Larger parameters are sent alone.
BUCKET = {"cuda": 500_000_000, "cpu": 10_000_000}

#: The same without ZeRO, and in bf16 at stage 1, where DeepSpeed cannot be told (``MEMORY_OPT_ALLREDUCE_SIZE``).
WHOLE_BUCKET = 500_000_000

#: Elements of gathered weights that ZeRO-3 keeps at most (``stage3_max_live_parameters``), and of those that it gathers
#: at once (``stage3_prefetch_bucket_size``): defaults of DeepSpeed's.
LIVE, PREFETCH = 1_000_000_000, 50_000_000

#: What a worker's process holds beside its model: Python, torch, DeepSpeed, transformers, and Ray's worker; 580 MB
#: measured without Ray (Linux, torch 2.13 for CPU), and 104 MB more with it. A worker that runs knows its own.
PROCESS_BYTES = 684_000_000

#: What malloc holds of a CPU's memory and does not give back, of all but the process: 6 to 36 % were measured of
#: SmolLM2-135M at ZeRO 0 to 3 in bf16 (``benchmarks/planner.py``). Calibration corrects it.
SLACK = 0.15

#: Bytes of a parameter in nf4: four bits, and a scale for each 64 of them, itself quantised (QLoRA, arXiv 2305.14314).
NF4_BYTES = 0.516

Parts = Mapping[str, int]


@dataclass(frozen=True)
class Memory:
    """What one rank needs.

    Attributes:
        moments: Parts in bytes at each moment at which memory may peak, by the moment's name; on the device.
        host: Parts in bytes in the memory of its machine; the same as the device's peak where that is the CPU.
        checkpoint_bytes: A checkpoint on the disk, over all ranks.
    """

    moments: Mapping[str, Parts]
    host: Parts
    checkpoint_bytes: int

    @property
    def peak(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> Parts:
        """The parts at that moment."""
        return self.moments[self.peak]

    @property
    def device_bytes(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in the machine's memory."""
        return sum(self.host.values())


def memory(shape: Shape, trained: int, setup: Setup, process_bytes: int = PROCESS_BYTES) -> Memory:
    """What training takes on one rank.

    Args:
        shape: The model.
        trained: Parameters Q that are trained.
        setup: How.
        process_bytes: What a worker's process holds before its model.
    """
    cpu = setup.device_type == "cpu"
    offloads = setup.offload == "cpu" and not cpu
    state, gradients = _state(shape, trained, setup), _kept_gradients(trained, setup)
    on_host = {"fp32 weights": state.pop("fp32 weights"), "moments": state.pop("moments")} if offloads else {}
    if offloads and setup.stage == 3:
        on_host |= {name: state.pop(name) for name in ("weights", "second copy of weights") if name in state}
    if offloads and setup.stage >= 2:
        on_host["gradients"], gradients = gradients, 0
    if cpu:
        state["process"] = process_bytes
    gathered = _gathered_bytes(shape, setup) if setup.stage == 3 else {}
    steady = {**state, **gathered}
    logits = 2 * 4 * shape.outputs * chunk_tokens(shape.outputs, setup.device_type)
    kept = setup.stage == 3 or (setup.stage == 1 and setup.bytes == 2)  # for good
    before = gradients if setup.passes > 1 or kept else 0
    moments: dict[str, Parts] = {
        "forward pass": {
            **steady,
            "activations": activation_bytes(shape, setup),
            "loss": loss_bytes(shape, trained, setup),
            "gradients": before,
        },
        "backward pass": {
            **steady,
            "gradients": gradients,
            "gradients on their way": _sending_bytes(shape, trained, setup),
        },
        "update": {**state, "gradients": gradients, "gradients in fp32": _update_bytes(trained, setup)},
        "evaluation": {**steady, "activations": _layer_bytes(shape, setup), "loss": logits},
    }
    loading = {"process": process_bytes, "file": shape.stored_bytes, "weights": shape.parameters * setup.bytes}
    if cpu:
        moments = {name: _with_slack(parts) for name, parts in moments.items()}
        moments["loading"] = loading
        host = moments[max(moments, key=lambda moment: sum(moments[moment].values()))]
    else:
        # What is on the host is saved from where it is (:class:`distft.engine.snapshot.Snapshot`).
        saving = {} if offloads else {"copy for saving": 12 * _saved(trained, setup)}
        training = {"process": process_bytes, **saving, **on_host}
        host = max(loading, training, key=lambda parts: sum(parts.values()))
    return Memory(moments, host, 12 * trained)


def _with_slack(parts: Parts) -> Parts:
    """The parts, and what the allocator holds beside them."""
    return {**parts, "allocator": round(SLACK * (sum(parts.values()) - parts["process"]))}


def _share(trained: int, setup: Setup) -> int:
    """Trained parameters whose optimizer state a rank keeps, Q or Q/N."""
    return _saved(trained, setup) if setup.stage > 0 else trained


def _saved(trained: int, setup: Setup) -> int:
    """Trained parameters whose state a rank saves, Q/N at every stage."""
    return math.ceil(trained / setup.workers)


def _weight_bytes(shape: Shape, setup: Setup) -> int:
    """Of the whole model, frozen matrices in four bits where the job says so."""
    packed = sum(map(math.prod, shape.matrices.values())) if setup.quantised else 0
    return round(packed * NF4_BYTES) + (shape.parameters - packed) * setup.bytes


def _state(shape: Shape, trained: int, setup: Setup) -> dict[str, int]:
    """What is kept from step to step but for gradients: ZeRO, arXiv 1910.02054, section 5."""
    adapter = 0 if trained == shape.parameters else trained
    weights = _weight_bytes(shape, setup) + adapter * setup.bytes
    plain = setup.bytes == 4 and (setup.stage == 0 or setup.offload == "none")  # they are stepped where they lie
    share = _share(trained, setup)
    state = {
        "weights": math.ceil(weights / setup.workers) if setup.stage == 3 else weights,
        "fp32 weights": 0 if plain else 4 * share,
        "moments": 8 * share,
    }
    if setup.stage == 3:
        state["bucket"] = setup.bytes * _bucket_elements(trained, setup)  # DeepSpeed keeps it
        if setup.hpz > 1:  # ZeRO++, arXiv 2306.10209, section 3.2
            state["second copy of weights"] = math.ceil(weights / setup.hpz)
    return state


def _gathered_bytes(shape: Shape, setup: Setup) -> Parts:
    """Weights that ZeRO-3 has put together, and the bucket in which the next ones come, of which they are copies."""
    weights = _weight_bytes(shape, setup)
    return {
        "gathered weights": min(weights, LIVE * setup.bytes),
        "gathering": min(weights, PREFETCH * setup.bytes),
    }


def _bucket_elements(trained: int, setup: Setup) -> int:
    """Of a buffer for gradients: on a GPU it is allocated whole, a CPU's memory is only taken where it is written."""
    bucket = BUCKET[setup.device_type]
    return min(trained, bucket) if setup.device_type == "cpu" else bucket


def _kept_gradients(trained: int, setup: Setup) -> int:
    """Gradients between the passes of a step: whole up to stage 1 (in bf16 fp32 sums), a share from stage 2 on."""
    if setup.stage == 0:
        return setup.bytes * trained
    return 4 * (trained if setup.stage == 1 else _share(trained, setup))


def _sending_bytes(shape: Shape, trained: int, setup: Setup) -> int:
    """Copies of gradients at the end of a backward pass: a bucket, its flat copy, and that in fp32 to be sent.

    At stages 1 and 2 there are two buckets on a GPU, since the next one fills while one is sent; on a CPU there are the
    bucket and its flat copy. ZeRO-3 keeps its bucket, which is counted with the state, and sends a copy of it that is
    ordered by rank. In fp32 stage 1 has the rank's share of the sum beside the gradients of all passes.
    """
    s, largest = setup.bytes, shape.outputs * shape.hidden if trained == shape.parameters else 0
    whole, bucket = min(trained, WHOLE_BUCKET), min(trained, max(BUCKET[setup.device_type], largest))
    cast = 4 * bucket if s == 2 else 0
    if setup.stage == 0:
        return (s + 4 if s == 2 else s) * whole
    if setup.stage == 1 and s == 2:
        return 2 * trained + 4 * whole
    share = 4 * _share(trained, setup) if s == 4 and (setup.stage == 1 or setup.offload == "cpu") else 0
    if setup.stage == 3:
        return cast + 4 * bucket
    return 2 * s * _bucket_elements(trained, setup) + cast + share


def _update_bytes(trained: int, setup: Setup) -> int:
    """Gradients as the optimizer takes them, where that is another copy: fp32 ones of bf16, and flat ones.

    Stages 1 and 2 sum them where the optimizer takes them from, in fp32 too
    (:func:`distft.engine.shares.sum_gradients_in_place`).
    """
    if setup.stage == 0:
        return 4 * trained if setup.bytes == 2 else 0
    if setup.offload == "cpu" and setup.device_type != "cpu":
        return 0  # it is the host that steps
    share = 4 * _share(trained, setup)
    return share if setup.stage == 3 or (setup.bytes == 4 and setup.stage == 2 and setup.offload == "cpu") else 0


def activation_bytes(shape: Shape, setup: Setup) -> int:
    """Activations that a forward pass leaves for the backward pass.

    The method of Korthikanti et al. (arXiv 2205.05198, section 4.1), which counts the tensors that each operation
    keeps, for the layers that transformers computes today: RMSNorm in fp32, SwiGLU, attention by torch's fused kernel,
    which keeps no T x T probabilities; a mask of them where texts are not attended one by one
    (:mod:`distft.model.segments`). Recomputing each layer keeps its input alone and one layer's activations
    (section 5 there; Chen et al., arXiv 1604.06174).
    """
    kept = setup.pass_tokens * shape.hidden * setup.bytes
    if setup.checkpointing:
        return shape.layers * kept + _layer_bytes(shape, setup)
    return shape.layers * _layer_bytes(shape, setup) + 4 * kept  # embedding, last norm


def _layer_bytes(shape: Shape, setup: Setup) -> int:
    """Of one layer: two norms, queries, keys, values, what attention gives, the MLP.

    With a mask keys and values are repeated to be as wide as the queries; otherwise they are kept as they are. Ranks
    that share rows keep all tokens of their share of the heads, at least one of keys, and the whole mask.
    A norm keeps its input and its normalised input in fp32 or cast back, and its output, which the matrices keep.
    Where what is elementwise is computed again (:mod:`distft.model.recompute`, compiled layers), a norm keeps its input
    alone, and the MLP what goes into its activation function and what that is multiplied with.
    """
    s, attention = setup.bytes, shape.heads * shape.head_size
    keys = attention if setup.masked else max(shape.kv_heads, setup.sharing) * shape.head_size
    again = setup.compiled or (setup.device_type == "cpu" and not setup.checkpointing)
    norms = 2 * (s if again else 4 + 2 * s) * shape.hidden
    wide = (2 if shape.gated else 1) * (1 if again else 2) * shape.intermediate * shape.experts_used
    mask = s * setup.row_tokens * setup.sharing if setup.masked else 0
    return round(setup.pass_tokens * (norms + 2 * s * (attention + keys) + s * wide + mask))


def loss_bytes(shape: Shape, trained: int, setup: Setup) -> int:
    """What head and loss hold beside the activations.

    Fused (:mod:`distft.model.cross_entropy`): a chunk's logits, their log-probabilities and gradient; gradients of the
    hidden states; the head's gradient, in bf16 with the gradients by the logits of at most 2 D tokens, which are
    collected for it, and in fp32 too where there are more. Otherwise all logits, in the type of the weights and twice
    in fp32.
    """
    s, tokens, outputs, hidden = setup.bytes, setup.pass_tokens, shape.outputs, shape.hidden
    if not shape.plain_head:
        return tokens * outputs * (2 * s + 8)
    chunk = min(tokens, chunk_tokens(outputs, setup.device_type))
    held = chunk * outputs * (4 + (2 * s if s == 2 else s)) + 2 * tokens * hidden * s
    if trained < shape.parameters:
        return held
    if s == 4:
        return held + 4 * outputs * hidden
    collected = min(tokens, max(chunk, 2 * hidden))
    return held + s * outputs * (collected + hidden) + (4 * outputs * hidden if tokens > collected else 0)

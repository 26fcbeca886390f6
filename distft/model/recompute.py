"""What is cheap to compute again is not kept for the backward pass: outputs of norms and of activation functions.

Otherwise each of them is kept, by the matrix product that it goes into, beside what it was computed from. A layer of
SmolLM2-135M keeps 11,136 numbers a token that way, by count, and needs 5,760; the rest costs no matrix product again.
This is selective activation recomputation (Korthikanti et al., arXiv 2205.05198, section 5) of elementwise operations,
for layers on CPUs that are not compiled: torch's compiler can do it by itself (``activation_memory_budget``), and GPUs,
where uncompiled elementwise operations take more of a step, were not measured.

The forward pass is the model's own, digit by digit, and so are the operations that gradients are computed through.
While a layer runs, torch's hooks on saved tensors know the outputs by their memory, and leave a note of how to compute
one in its place (https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.saved_tensors_hooks).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Where activation functions are defined.
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def recompute_elementwise(model: PreTrainedModel) -> None:
    """Has each layer keep less for its backward pass: norms, activation functions, and gates of feed-forward parts.

    Args:
        model: Its modules' ``forward`` are replaced by ones that give the same.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    kept = _Kept()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.modules():
                if _is_gated(module):
                    module.forward = functools.partial(_gated, module, copy.deepcopy(module.act_fn), kept)
                elif _is_elementwise(module):
                    module.forward = functools.partial(_alone, module, copy.deepcopy(module), kept)
            layer.forward = functools.partial(_layer, kept, layer.forward)


def _is_elementwise(module: nn.Module) -> bool:
    """Whether it is an activation function, or a norm that scales by vectors; neither has another state."""
    if [*module.children(), *module.buffers()]:
        return False
    if type(module).__module__ in ACTIVATIONS:
        return True
    own = [*module.parameters()]
    return "norm" in type(module).__name__.lower() and bool(own) and all(each.ndim == 1 for each in own)


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Whether it is ``down(act(gate(x)) * up(x))``, as most are (SwiGLU, arXiv 2002.05202): found by trying."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    size = getattr(parts[0], "in_features", None)
    if not all(isinstance(part, nn.Module) for part in parts) or size is None:
        return False
    weight = next(module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else None
    states = torch.linspace(-1, 1, size, dtype=dtype, device=weight.device)[None, None]
    training = module.training
    module.eval()
    try:
        return torch.equal(module(states), _gated(module, parts[-1], _Kept(), states))
    except (RuntimeError, TypeError):  # it wants more than the states
        return False
    finally:
        module.train(training)


def _gated(module: Any, act: nn.Module, kept: _Kept, states: Tensor) -> Tensor:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        made: Tensor = act(gate) * up
        return made

    found: Tensor = module.down_proj(_again(product, kept, module.gate_proj(states), module.up_proj(states)))
    return found


def _alone(module: nn.Module, twin: nn.Module, kept: _Kept, states: Tensor, *more: Any, **named: Any) -> Tensor:
    """By a twin, which nobody hooks; with a copy of the vectors, which ZeRO-3 takes away until the backward pass."""
    names = [name for name, _ in module.named_parameters()]

    def function(states: Tensor, *vectors: Tensor) -> Tensor:
        made: Tensor = functional_call(twin, dict(zip(names, vectors, strict=True)), (states, *more), named)
        return made

    vectors = [vector.clone() for vector in module.parameters()]
    if more or named:  # such as a gate, which would have to be kept as well
        return function(states, *vectors)
    return _again(function, kept, states, *vectors)


def _layer(kept: _Kept, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack), kept:
        return forward(*given, **named)


def _again(function: Callable[..., Tensor], kept: _Kept, *tensors: Tensor) -> Tensor:
    """The function's output, which is computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    found: Tensor = _Again.apply(function, kept, *tensors)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class _Note:
    """In place of a tensor: whose output it is, and which part of it."""

    source: Any
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Kept:
    """The outputs of the layer that runs now, by their memory; they live until it has run, so that no other has it."""

    def __init__(self) -> None:
        self._outputs: dict[int, tuple[Tensor, Any]] | None = None

    def __enter__(self) -> None:
        self._outputs = {}

    def __exit__(self, *_: object) -> None:
        self._outputs = None

    def add(self, output: Tensor, source: Any, inputs: Sequence[Tensor]) -> None:
        """An output, and the node of the graph that can compute it again; nothing where whole layers are.

        What is the input itself is kept: it cannot be computed from itself.
        """
        place = output.untyped_storage().data_ptr()
        if self._outputs is not None and all(one.untyped_storage().data_ptr() != place for one in inputs):
            self._outputs[place] = output, source

    def pack(self, tensor: Tensor) -> Any:
        """What is kept of a tensor that an operation saves."""
        if tensor.is_leaf:  # a parameter, which ZeRO-3 fills again before the backward pass
            return tensor
        _, source = (self._outputs or {}).get(tensor.untyped_storage().data_ptr(), (None, None))
        if source is None:
            return tensor.detach()  # an operation that saved its own output would never be freed
        return _Note(source, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """The tensor."""
        if isinstance(kept, _Note):
            output, _ = _computed(kept.source)
            return output.detach().as_strided(kept.shape, kept.stride, kept.offset)
        tensor: Tensor = kept
        return tensor


class _Again(torch.autograd.Function):
    """A function of tensors whose output nobody has to keep.

    Who needs the output in the backward pass comes first and has it computed, with a graph, through which this
    function's own gradient goes then: nothing is computed a third time.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], kept: _Kept, *tensors: Tensor) -> Tensor:
        """The function's output."""
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.computed = function, None
        output = function(*tensors)
        kept.add(output, ctx, tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """By each tensor."""
        output, tensors = _computed(ctx)
        ctx.computed = None
        gradients = iter(torch.autograd.grad(output, [one for one in tensors if one.requires_grad], gradient))
        return None, None, *(next(gradients) if one.requires_grad else None for one in tensors)


def _computed(ctx: Any) -> tuple[Tensor, list[Tensor]]:
    """The output of an :class:`_Again`, with its graph, and the tensors at which that begins."""
    if ctx.computed is None:
        tensors = [one.detach().requires_grad_(one.requires_grad) for one in ctx.saved_tensors]
        with torch.enable_grad():
            ctx.computed = ctx.function(*tensors), tensors
    found: tuple[Tensor, list[Tensor]] = ctx.computed
    return found

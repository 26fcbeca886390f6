"""The head's matrix product and the cross-entropy in one step, so that no full logits ever exist.

Shapes: N supervised tokens, D hidden, V vocabulary. Logits of N x V are the largest tensor of a small model's
training step (1,024 tokens of SmolLM2: 201 MB, several times over). Here they exist for a chunk of tokens at a
time, and since the loss is a sum, its gradient by the logits (softmax minus one-hot) is known at once: the
gradients by hidden states and weight are computed in the forward pass and only scaled in the backward pass.

Sources: Liger Kernel (arXiv 2410.10989, section 3.2, FusedLinearCrossEntropy), whose arithmetic this is in plain
torch; Wijmans et al., Cut Your Losses (arXiv 2411.09009), who go further on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distft.model.chunk import chunk_tokens
from distft.model.tied import Gradient, Tie


class LossHead(nn.Linear):
    """An output layer without bias that can also give the loss.

    It is a module, called as one, so that ZeRO-3 gathers the weight around its forward pass; the weight stays the
    Parameter that it was, tied or not.
    """

    #: With the embedding that has the same weight, which then gives the gradient of both (:mod:`distft.model.tied`).
    tie: Tie | None = None

    @classmethod
    def of(cls, head: nn.Linear, tie: Tie | None = None) -> LossHead:
        """The same layer, sharing its weight."""
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight = head.weight
        made.tie = tie
        return made.train(head.training)

    def forward(  # type: ignore[override]
        self, input: Tensor, targets: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits or losses.

        Args:
            input: Hidden states, (..., D), or (N, D) with targets.
            targets: Ids to predict, (N,) int64, or None for logits.

        Returns:
            Logits (..., V) without targets. With targets the sum of the token losses, a scalar, and the token losses,
            (N,), through which no gradient goes; both in fp32 (fp64 for fp64).
        """
        if targets is None:
            return super().forward(input)
        if torch.is_grad_enabled():
            shared = None if self.tie is None else self.tie.take()
            weight = self.weight if shared is None else self.weight.detach()
            both: tuple[Tensor, Tensor] = _SummedCrossEntropy.apply(input, weight, targets, shared)  # type: ignore[no-untyped-call]
            return both
        losses = torch.cat([chunk.losses for chunk in _chunks(input, self.weight, targets)])
        return losses.sum(), losses


class _Chunk:
    """A few tokens' log-probabilities and losses; ``log_probabilities`` lies in a buffer that the next one reuses."""

    def __init__(self, rows: slice, log_probabilities: Tensor, targets: Tensor) -> None:
        self.rows = rows
        self.targets = targets[:, None]
        self.log_probabilities = log_probabilities
        self.losses = log_probabilities.gather(1, self.targets).squeeze(1).neg_()

    def gradient(self) -> Tensor:
        """The gradient of the losses' sum by the logits: softmax minus one-hot, (n, V), in place."""
        gradient = self.log_probabilities.exp_()
        gradient.scatter_add_(1, self.targets, gradient.new_full((1, 1), -1).expand_as(self.targets))
        return gradient


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[_Chunk]:
    tokens, size = hidden.shape[0], chunk_tokens(len(weight), weight.device.type)
    logits = hidden.new_empty(min(tokens, size), weight.shape[0])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    for start in range(0, max(tokens, 1), size):
        rows = slice(start, min(start + size, tokens))
        part = logits[: rows.stop - rows.start]
        torch.mm(hidden[rows], weight.t(), out=part)
        yield _Chunk(rows, torch.log_softmax(part, dim=1, dtype=dtype), targets[rows])


class _WeightGradient:
    """The gradient by the weight, (V, D): chunks' gradients by the logits, transposed, times their hidden states.

    In fp32 each chunk adds its product. In a shorter type that would round every product, and read and write the sum in
    fp32 once a chunk; so the gradients by the logits of 2 D tokens are collected first, which take what that sum takes.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._hidden, self._weight = hidden, weight
        self._sum: Tensor | None = None
        self._adds_each = hidden.dtype == torch.promote_types(hidden.dtype, torch.float32)
        most = 0 if self._adds_each else max(chunk_tokens(len(weight), weight.device.type), 2 * weight.shape[1])
        self._collected = hidden.new_empty(min(most, len(hidden)), weight.shape[0])
        self._begin = self._end = 0

    def add(self, gradient: Tensor, rows: slice) -> None:
        """Adds a chunk's part: its gradient by the logits, (n, V), and which tokens it is of."""
        if self._adds_each:
            hidden = self._hidden[rows]
            self._sum = gradient.t() @ hidden if self._sum is None else self._sum.addmm_(gradient.t(), hidden)
            return
        if rows.stop - self._begin > len(self._collected):
            self._take()
        self._collected[rows.start - self._begin : rows.stop - self._begin] = gradient
        self._end = rows.stop

    def _take(self) -> None:
        """Adds the part of what is collected."""
        part = self._collected[: self._end - self._begin].t() @ self._hidden[self._begin : self._end]
        self._sum = part if self._sum is None else self._sum.float().add_(part)
        self._begin = self._end

    def whole(self) -> Tensor:
        """The gradient, in the weight's type."""
        if not self._adds_each:
            self._take()
        assert self._sum is not None
        return self._sum.to(self._weight.dtype)


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of token losses of ``hidden @ weight.T``, and the token losses; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shared: Gradient | None
    ) -> tuple[Tensor, Tensor]:
        """Losses and, where asked for, both gradients of their sum; that by a shared weight goes to ``shared``."""
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or shared is not None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = _WeightGradient(hidden, weight) if wants_weight else None
        for chunk in _chunks(hidden, weight, targets):
            total += chunk.losses.sum()
            losses[chunk.rows] = chunk.losses
            if d_hidden is None and d_weight is None:
                continue
            gradient = chunk.gradient().to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[chunk.rows])
            if d_weight is not None:
                d_weight.add(gradient, chunk.rows)
        ctx.gradients = d_hidden, None if d_weight is None else d_weight.whole()
        ctx.shared = shared
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scales in place: a second gradient as large as the head would be the step's peak of memory."""
        if ctx.gradients is None:
            raise RuntimeError("this loss has been differentiated already (retain_graph is not supported)")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                gradient.mul_(scale)
        if ctx.shared is not None:
            ctx.shared.of_head, d_weight = d_weight, None
        return d_hidden, d_weight, None, None

"""An embedding that shares its weight with the head, and gives the gradient of both uses in one tensor.

Autograd would make a tensor of V x D zeros for the few rows that the embedding has read, and a third one for the sum
with the head's gradient: of SmolLM2-135M in fp32 226 MB beside the head's 113 MB, in each pass. Here the head leaves
its gradient to the embedding, which adds its rows to it. So the weight has one place in the graph, and the head's
gradient goes there together with the embedding's.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Gradient:
    """The head's part of the weight's gradient in one pass: (V, D), in the weight's type; the embedding takes it."""

    def __init__(self) -> None:
        self.of_head: Tensor | None = None


class Tie:
    """What embedding and head know of one another: the gradient of the pass that the embedding began last."""

    def __init__(self) -> None:
        self._begun: Gradient | None = None

    def begin(self) -> Gradient:
        """For the embedding: the gradient of a new pass."""
        self._begun = Gradient()
        return self._begun

    def take(self) -> Gradient | None:
        """For the head: the gradient of the pass, once; None where the embedding has begun none."""
        begun, self._begun = self._begun, None
        return begun


class TiedEmbedding(nn.Embedding):
    """An embedding whose weight the head has too.

    On a GPU it is a usual one: the order of the sums would change from run to run, or the pass wait for the device.
    """

    tie: Tie

    @classmethod
    def of(cls, embedding: nn.Embedding) -> TiedEmbedding:
        """The same layer, sharing its weight."""
        made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        made.weight = embedding.weight
        made.tie = Tie()
        return made.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D)."""
        if torch.is_grad_enabled() and self.weight.requires_grad and self.weight.device.type == "cpu":
            found: Tensor = _Rows.apply(input, self.weight, self.padding_idx, self.tie.begin())  # type: ignore[no-untyped-call]
            return found
        return super().forward(input)


class _Rows(torch.autograd.Function):
    """Rows of the weight; its gradient is the head's, with those of the rows added in place."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, gradient: Gradient) -> Tensor:
        ctx.ids, ctx.padding_idx, ctx.gradient = ids, padding_idx, gradient
        ctx.weight = weight.shape, weight.dtype  # ZeRO-3 has taken its elements away by the time of the backward pass
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[None, Tensor, None, None]:
        """A row that was read several times is summed in fp32 (fp64 for fp64) first, and rounded once."""
        shape, dtype = ctx.weight
        whole, ctx.gradient.of_head = ctx.gradient.of_head, None
        if whole is None:
            whole = by_output.new_zeros(shape, dtype=dtype)
        rows, places = ctx.ids.unique(return_inverse=True)
        summed = torch.zeros(len(rows), shape[1], dtype=torch.promote_types(dtype, torch.float32))
        summed.index_add_(0, places.flatten(), by_output.reshape(-1, shape[1]).to(summed.dtype))
        if ctx.padding_idx is not None:
            summed[rows == ctx.padding_idx] = 0
        whole[rows] = (whole[rows] + summed).to(dtype)
        return None, whole, None, None

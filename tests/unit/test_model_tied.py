"""An embedding and a head with one weight give one gradient: that of autograd, in one tensor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distft.model import Batch, LossModel
from distft.model.cross_entropy import LossHead
from distft.model.tied import TiedEmbedding
from tests.unit.test_model_loss import tiny

VOCABULARY, HIDDEN = 23, 6
IDS = torch.tensor([[4, 4, 7, 4, 0, 22], [7, 1, 0, 0, 4, 9]])
TARGETS = torch.randint(0, VOCABULARY, (IDS.numel(),), generator=torch.Generator().manual_seed(2))


class Tiny(nn.Module):
    """An embedding, something between, and a head of the same weight."""

    def __init__(self, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        embedding = nn.Embedding(VOCABULARY, HIDDEN, padding_idx, dtype=dtype)
        self.plain = embedding
        self.embedding = TiedEmbedding.of(embedding)
        head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
        head.weight = embedding.weight
        self.head = LossHead.of(head, self.embedding.tie)

    def loss(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        hidden = torch.tanh(self.embedding(ids)).reshape(-1, HIDDEN)
        return self.head(hidden, TARGETS)[0] * scale

    def expected(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        logits = F.linear(torch.tanh(self.plain(ids)).reshape(-1, HIDDEN), self.plain.weight)
        return F.cross_entropy(logits.double(), TARGETS, reduction="sum") * scale

    def gradient(self, loss: Tensor) -> Tensor:
        self.plain.weight.grad = None
        loss.backward()
        assert self.plain.weight.grad is not None
        return self.plain.weight.grad.clone()


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
def test_the_gradient_of_both_uses(padding_idx: int | None) -> None:
    model = Tiny(torch.float64, padding_idx)
    found = model.gradient(model.loss(IDS, 0.3))
    torch.testing.assert_close(found, model.gradient(model.expected(IDS, 0.3)), rtol=1e-12, atol=1e-14)


def test_several_passes_before_one_backward_pass() -> None:
    model = Tiny(torch.float64)
    found = model.gradient(model.loss(IDS) + model.loss(IDS.flip(0), 2.0))
    expected = model.gradient(model.expected(IDS) + model.expected(IDS.flip(0), 2.0))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_pass_that_was_given_up_leaves_nothing() -> None:
    model = Tiny(torch.float64)
    model.loss(IDS)
    model.embedding(IDS)
    found = model.gradient(model.loss(IDS))
    torch.testing.assert_close(found, model.gradient(model.expected(IDS)), rtol=1e-12, atol=1e-14)


def test_each_without_the_other() -> None:
    model = Tiny(torch.float64)
    looked_up = model.gradient(model.embedding(IDS).square().sum())
    torch.testing.assert_close(looked_up, model.gradient(model.plain(IDS).square().sum()), rtol=1e-12, atol=0)
    model = Tiny(torch.float64)
    hidden = torch.ones(len(TARGETS), HIDDEN, dtype=torch.float64)
    expected = F.cross_entropy(F.linear(hidden, model.plain.weight), TARGETS, reduction="sum")
    torch.testing.assert_close(model.gradient(model.head(hidden, TARGETS)[0]), model.gradient(expected))


def test_bf16_rounds_no_more_than_autograd_would() -> None:
    model, exact = Tiny(torch.bfloat16), Tiny(torch.float64)
    with torch.no_grad():
        exact.plain.weight.copy_(model.plain.weight)
    truth = exact.gradient(exact.expected(IDS))
    found, usual = (model.gradient(loss).double() for loss in (model.loss(IDS), model.expected(IDS)))
    assert (found - truth).norm() <= (usual - truth).norm()


class Allocations(TorchDispatchMode):
    """How many tensors of one shape operations make."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.made = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.shape == self.shape:
                self.made += one.untyped_storage().data_ptr() not in given
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_makes_one_tensor_as_large_as_the_weight(dtype: torch.dtype) -> None:
    """SmolLM2-135M's would take 226 MB more in fp32 at the end of each backward pass."""
    model = tiny("llama-tied", dtype)
    usual, model = LossModel(copy.deepcopy(model), fused=False), LossModel(model)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.model.config.vocab_size, (2, 12), generator=draw)
    batch = Batch(ids, torch.arange(12).repeat(2, 1), torch.roll(ids, -1, 1))
    made = []
    for each in (model, usual):
        with Allocations(each.model.get_input_embeddings().weight.shape) as allocations:
            each(batch)[0].backward()
        made.append(allocations.made)
    assert made[0] == 1 < made[1]

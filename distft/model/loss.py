"""A causal language model and its loss over the supervised tokens of a batch.

Shapes: B rows, T tokens, N supervised tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.model.batch import IGNORED, Batch
from distft.model.cross_entropy import LossHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LossModel(nn.Module):
    """A model whose output is its loss.

    Where the model's logits are nothing but ``head(backbone(x))``, backbone and head are called apart and the loss
    is computed chunk by chunk (:mod:`distft.model.cross_entropy`). Models that do more (soft-capping, scaling, a
    bias) take the plain path: their own logits, then torch's cross-entropy. Which it is, is found by comparing on a
    few tokens, not by a list of names. Both paths give the same loss and gradients.

    No attention mask is ever passed and no cache is ever used: either would switch off, without a word, the
    isolation of packed segments that transformers reads from ``position_ids`` (transformers#46634).

    Args:
        model: A causal language model of transformers; its output layer is replaced by an equal one.
        activation_checkpointing: Whether to recompute each layer in the backward pass, to save memory.
        fused: Whether to compute the loss chunk by chunk; by default wherever that is the same.
    """

    def __init__(
        self, model: PreTrainedModel, *, activation_checkpointing: bool = False, fused: bool | None = None
    ) -> None:
        super().__init__()
        self.model = model
        if activation_checkpointing:
            # Reentrant checkpointing loses gradients where no input requires one, and its hooks disturb ZeRO's.
            # The second name is that of transformers before 5.23; remove when the first is in the oldest we support.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.fused = _is_plain_head(model) if fused is None else fused
        if self.fused:
            model.set_output_embeddings(LossHead.of(cast(nn.Linear, model.get_output_embeddings())))

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the token losses, a scalar in fp32: 0 for a batch without supervised tokens, never NaN."""
        supervised = batch.labels != IGNORED
        return self._losses(batch, supervised).sum()

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Each position's loss, (B, T) in fp32; 0 where nothing is supervised. Without gradients."""
        supervised = batch.labels != IGNORED
        losses = torch.zeros(batch.labels.shape, device=batch.labels.device)
        losses[supervised] = self._losses(batch, supervised).float()
        return losses

    def _losses(self, batch: Batch, supervised: Tensor) -> Tensor:
        """Losses of the supervised positions, (N,), or already their sum where gradients are recorded."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        targets = batch.labels[supervised]
        if self.fused:
            hidden = self.model.base_model(**inputs).last_hidden_state
            return cast(Tensor, self.model.get_output_embeddings()(hidden[supervised], targets))
        logits = self.model(**inputs).logits[supervised]
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def _is_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits on a few tokens are its output layer applied to its backbone's last state."""
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, LossHead) or head.bias is not None or model.base_model is model:
        return False
    states: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
    training = model.training
    try:
        probe = torch.arange(4, device=head.weight.device)[None] % head.out_features
        with torch.no_grad():
            logits = model.eval()(input_ids=probe, use_cache=False).logits
            return torch.allclose(logits, head(states[0]), rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    finally:
        hook.remove()
        model.train(training)

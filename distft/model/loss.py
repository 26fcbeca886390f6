"""A language model or classifier, and its loss over the supervised tokens of a batch.

For a classifier a text's one supervised token is its label's number, which stands behind its last real token: that
token predicts it as a language model predicts the next token, with the head of K labels in place of that of V tokens.

Shapes: B rows, T tokens, N supervised tokens, D hidden, V vocabulary, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distft.model.batch import IGNORED, Batch
from distft.model.cross_entropy import LossHead
from distft.model.recompute import recompute_elementwise
from distft.model.segments import attend_by_segments
from distft.model.tied import TiedEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LossModel(nn.Module):
    """A model whose output is its loss.

    Where the model's logits are nothing but ``head(backbone(x))``, backbone and head are called apart and the loss
    is computed chunk by chunk (:mod:`distft.model.cross_entropy`). Models that do more (soft-capping, scaling, a
    bias) take the plain path: their own logits, then torch's cross-entropy. Which it is, is found by comparing on a
    few tokens, not by a list of names. Both paths give the same loss and gradients.

    No attention mask is ever passed and no cache is ever used: either would switch off, without a word, the
    isolation of packed segments that transformers reads from ``position_ids`` (transformers#46634). On CPUs attention
    is computed segment by segment where that is the same (:mod:`distft.model.segments`), and what is cheap to compute
    again is not kept (:mod:`distft.model.recompute`).

    Args:
        model: A causal language model of transformers, whose output layer is replaced by an equal one, or a
            classifier (:func:`distft.model.load_classifier`).
        activation_checkpointing: Whether to recompute each layer in the backward pass, to save memory.
        fused: Whether to compute a language model's loss chunk by chunk; by default wherever that is the same.
        class_weights: What each label's losses are multiplied with, (K,); None for 1.
        compiled: Whether each layer is compiled for training, one kind of layer and shape of batch at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        activation_checkpointing: bool = False,
        fused: bool | None = None,
        class_weights: Sequence[float] | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        if activation_checkpointing:
            # Reentrant checkpointing loses gradients where no input requires one, and its hooks disturb ZeRO's.
            # The second name is that of transformers before 5.23; remove when the first is in the oldest we support.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.classifies = isinstance(getattr(model, "score", None), nn.Linear)
        # No buffer: DeepSpeed would round it to bf16 with the model.
        self._class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.fused = not self.classifies and (_is_plain_head(model) if fused is None else fused)
        if self.fused:
            _fuse_head(model)
        self.by_segments = attend_by_segments(model)
        if compiled:
            _compile_layers(model)
        elif not torch.cuda.is_available():
            recompute_elementwise(model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's loss, and whose it is.

        Returns:
            The sum of the token losses, a scalar in fp32: 0 for a batch without supervised tokens, never NaN.
            The same row by row, (B,) in fp64 and without gradient.
        """
        supervised = batch.labels != IGNORED
        total, losses = self._losses(batch, supervised)
        # Not index_add: the order of its sums, and so their last digits, change from run to run on a GPU.
        by_position = torch.zeros(supervised.shape, dtype=torch.float64, device=losses.device)
        by_position[supervised] = losses.detach().double()
        return total, by_position.sum(dim=1)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Each position's loss, (B, T) in fp32; 0 where nothing is supervised. Without gradients."""
        return self.scores(batch)[0]

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What validation looks at, without gradients.

        Returns:
            Each position's loss, (B, T) in fp32, by class weights where there are any; 0 where nothing is supervised.
            Whether a classifier thinks the position's label the likeliest, (B, T) bool; nowhere for language models.
        """
        supervised = batch.labels != IGNORED
        losses = torch.zeros(batch.labels.shape, device=batch.labels.device)
        hits = torch.zeros_like(supervised)
        with torch.compiler.set_stance("force_eager"):  # rows of any shape: each would be compiled
            if self.classifies:
                targets, logits = batch.labels[supervised], self._class_logits(batch, supervised)
                losses[supervised] = self._class_losses(logits, targets).float()
                hits[supervised] = logits.argmax(1) == targets
            else:
                losses[supervised] = self._losses(batch, supervised)[1].float()
        return losses, hits

    @torch.no_grad()
    def class_log_probabilities(self, batch: Batch) -> Tensor:
        """A classifier's log-probabilities of the labels at each supervised position, row by row: (N, K) in fp32."""
        return torch.log_softmax(self._class_logits(batch, batch.labels != IGNORED).float(), dim=1)

    def _losses(self, batch: Batch, supervised: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses of the supervised positions, with gradient, and those losses, (N,)."""
        targets = batch.labels[supervised]
        if self.fused:
            hidden = self.model.base_model(**_inputs(batch)).last_hidden_state
            return cast(tuple[Tensor, Tensor], self.model.get_output_embeddings()(hidden[supervised], targets))
        if self.classifies:
            losses = self._class_losses(self._class_logits(batch, supervised), targets)
        else:
            logits = _in_fp32(self.model(**_inputs(batch)).logits[supervised])
            losses = F.cross_entropy(logits, targets, reduction="none")
        return losses.sum(), losses

    def _class_logits(self, batch: Batch, supervised: Tensor) -> Tensor:
        """(N, K) in fp32; the model's own forward would look for one last token a row, and rows hold several texts."""
        hidden = self.model.base_model(**_inputs(batch)).last_hidden_state
        return _in_fp32(self.model.score(hidden[supervised]))

    def _class_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if self._class_weights is None else self._class_weights.to(logits)
        return F.cross_entropy(logits, targets, weights, reduction="none")


def _fuse_head(model: PreTrainedModel) -> None:
    """Replaces the output layer, and an embedding that has the same weight, by equal ones."""
    head, embedding = cast(nn.Linear, model.get_output_embeddings()), model.get_input_embeddings()
    tie = None
    if embedding.weight is head.weight and type(embedding) is nn.Embedding:
        model.set_input_embeddings(tied := TiedEmbedding.of(embedding))
        tie = tied.tie
    model.set_output_embeddings(LossHead.of(head, tie))


def _compile_layers(model: PreTrainedModel) -> None:
    """Compiles each layer by itself: equal ones share their code, so that it takes one layer's time, not all of theirs.

    What cannot be compiled is computed as before, with a warning. Shapes are taken as they are: kernels for shapes yet
    unknown would depend on which one came first, and their last digits with them.
    """
    from torch._inductor import config
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch._dynamo.config.suppress_errors = True
    config.compile_threads = 1  # otherwise each rank starts as many processes more as there are cores
    # Of what a layer keeps, this share at most: elementwise operations are computed again, matrix products are not
    # (below 0.68 they would be, in layers such as Llama's and SmolLM2's). On a CPU it takes less time, too.
    torch._functorch.config.activation_memory_budget = 0.7
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}


def _in_fp32(logits: Tensor) -> Tensor:
    """At least: fp64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


#: A size of logits at which a cap on them (Gemma 2's is 30) shows, whatever size they have before training.
_LARGE_LOGITS = 1e3


def _is_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits on a few tokens are its output layer applied to its backbone's last state.

    The state is made so large that the logits are too: a cap leaves small ones as they are.
    """
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, LossHead) or head.bias is not None or model.base_model is model:
        return False
    states: list[Tensor] = []

    def enlarge(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        state = output[0] * (_LARGE_LOGITS / head(output[0]).abs().max().clamp(min=1e-6))
        states.append(state)
        output["last_hidden_state"] = state
        return output

    hook = model.base_model.register_forward_hook(enlarge)
    training = model.training
    try:
        probe = torch.arange(4, device=head.weight.device)[None] % head.out_features
        with torch.no_grad():
            logits = model.eval()(input_ids=probe, use_cache=False).logits
            return torch.allclose(logits, head(states[0]), rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    finally:
        hook.remove()
        model.train(training)

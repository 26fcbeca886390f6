"""What the training engine answers: greedy tokens and log-probabilities by a plain forward pass of the trained model.

T: tokens of an answer. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distft.certificate.prompts import Asks
from distft.certificate.record import Ask, Record
from distft.model import answers, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STOPS = 2  # endings that are kept
_BARE = 4  # prompts whose answers are looked at without the adapter


def witness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Asks, labels: Sequence[str] = ()
) -> tuple[Record, ...]:
    """Answers of the model as it was trained; where it has an adapter, with that apart, so that merging is proved too.

    Tokens are found with a cache, many prompts at a time. What is recorded comes from one forward pass over each
    prompt with its answer, as training makes it: no cache, no padding, no mask. Where that likes another token better
    (a tie), its own stands, and the record ends there.

    Args:
        model: With the checkpoint's weights, in the dtype of the training.
        tokenizer: Its tokenizer.
        asked: The prompts.
        labels: A classifier's labels in the order of their numbers.
    """
    from distft.model.adapter import has_adapter, without_adapter

    model.eval()
    adapted = has_adapter(model)
    if labels:
        said = [_labels(model, ask, labels) for ask in asked.prompts]
        with without_adapter(model) if adapted else nullcontext():
            bare = [_labels(model, ask, labels) if adapted else {} for ask in asked.prompts]
        return tuple(
            Record(ask, labels=one, bare_labels=other)
            for ask, one, other in zip(asked.prompts, said, bare, strict=True)
        )
    stops = stop_ids(tokenizer)
    written = answers(model, tokenizer, [ask.ids for ask in asked.prompts], asked.new_tokens)
    tokens = [answer.ids for answer in written]
    records = [_record(model, ask, ids, stops) for ask, ids in zip(asked.prompts, tokens, strict=True)]
    for ask in asked.endings:
        if sum(len(record.tokens) == 1 and record.stopped for record in records) < _STOPS:
            record = _record(model, ask, (), stops)
            records += [record] if record.stopped else []
    if not adapted:
        return tuple(records)
    with without_adapter(model):
        return tuple(_with_bare(model, record) if place < _BARE else record for place, record in enumerate(records))


@torch.inference_mode()
def _forced(model: PreTrainedModel, ids: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Log-probabilities at each of the tokens and behind the last of them, (T + 1, V) in fp32."""
    row = torch.tensor([[*ids, *tokens]])
    logits = model(input_ids=row, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _record(model: PreTrainedModel, ask: Ask, tokens: Sequence[int], stops: Sequence[int]) -> Record:
    """The model's likeliest tokens along those that were found, up to where it would rather say something else."""
    best, found = _forced(model, ask.ids, tokens).topk(2, dim=-1)
    likeliest: list[int] = found[:, 0].tolist()
    ends = [
        place for place, token in enumerate(likeliest) if token in stops or [token] != list(tokens[place : place + 1])
    ]
    last = ends[0]  # the place behind the last token is one of them
    length = last + 1 if likeliest[last] in stops or last < len(tokens) or not tokens else last
    return Record(
        ask,
        tuple(likeliest[:length]),
        tuple(_rounded(best[:length, 0])),
        tuple(_rounded(best[:length, 0] - best[:length, 1])),
        likeliest[length - 1] in stops,
    )


def _with_bare(model: PreTrainedModel, record: Record) -> Record:
    best, found = _forced(model, record.ask.ids, record.tokens[:-1]).max(dim=-1)
    return Record(**{**vars(record), "bare": tuple(zip(found.tolist(), _rounded(best), strict=True))})


@torch.inference_mode()
def _labels(model: PreTrainedModel, ask: Ask, labels: Sequence[str]) -> dict[str, float]:
    state = model.base_model(input_ids=torch.tensor([ask.ids]), use_cache=False).last_hidden_state[0, -1]
    return dict(zip(labels, _rounded(torch.log_softmax(model.score(state).float(), dim=-1)), strict=True))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]

"""Writing text with a model, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distft.errors import JobError, RunError
from distft.model.tokenizer import end_of_text_id, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Continues a prompt; yields the text in pieces, as it comes.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: What to continue; empty for the beginning of a document.
        max_new_tokens: At most this many; fewer where the model ends the text or its context is full.
        temperature: 0 always takes the likeliest token; 1 draws from the model's distribution.
        seed: Of the draws. The same seed, prompt and device give the same text.

    Raises:
        JobError: A number is out of range, or the prompt fills the model's context.
        RunError: The model's output is not finite.
    """
    if max_new_tokens < 1:
        raise JobError(f"max_new_tokens is {max_new_tokens}", fix="ask for 1 or more")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise JobError(f"temperature is {temperature}", fix="0 for the likeliest text, around 1 for varied text")
    ids: list[int] = tokenizer(prompt)["input_ids"] or [end_of_text_id(tokenizer)]
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(ids) >= context:
        raise JobError(f"the prompt has {len(ids)} tokens; the model reads {context}", fix="shorten the prompt")
    limit = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    yield from _decode(tokenizer, _tokens(model, ids, limit, temperature, seed, set(stop_ids(tokenizer))))


@torch.inference_mode()
def _tokens(
    model: PreTrainedModel, prompt: list[int], limit: int, temperature: float, seed: int, stops: set[int]
) -> Iterator[int]:
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.tensor([prompt], device=model.device)
    cache = None
    for _ in range(limit):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = _draw(output.logits[0, -1].float(), temperature, generator)
        if token in stops:
            return
        yield token
        ids = torch.tensor([[token]], device=model.device)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One id from logits (V,)."""
    if not torch.isfinite(logits).all():
        raise RunError("the model's output is not finite", fix="its weights are damaged, or overflow in this dtype")
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Text of a stream of ids; a character of several tokens waits for its last one."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            continue
        if piece := text[len(shown) :]:
            yield piece
        shown = text
    if rest := tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]:
        yield rest

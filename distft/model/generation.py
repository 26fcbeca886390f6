"""Writing text with a model, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distft.errors import JobError, RunError
from distft.model.decoding import TextStream
from distft.model.tokenizer import end_of_text_id, pad_id, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH_PROMPTS, BATCH_TOKENS = 16, 16_384
"""The most prompts of one batch, and the most tokens, padding and answers counted."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Attributes:
        ids: Its tokens, without the one that ended it.
        stopped: Whether the model ended it, rather than a limit.
    """

    ids: tuple[int, ...]
    stopped: bool


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that the model reads at most, prompt and answer together; None where its configuration names no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def batches(lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Prompts dealt to batches of like length, longest first, so that padding is small and memory shows at once.

    A function of the prompts alone: which batch is answered by which process changes no answer.

    Args:
        lengths: Tokens of each prompt.
        max_new_tokens: As for :func:`answers`.

    Returns:
        The numbers of the prompts of each batch.
    """
    result: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        width = lengths[result[-1][0]] + max_new_tokens if result else 0
        if not result or len(result[-1]) == BATCH_PROMPTS or (len(result[-1]) + 1) * width > BATCH_TOKENS:
            result.append([])
        result[-1].append(number)
    return result


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[Answer]:
    """What the model writes after each prompt, likeliest token by likeliest token, as one batch.

    An answer is what the model would write to that prompt alone. It ends at an id of
    :func:`distft.model.stop_ids`, after ``max_new_tokens``, or where prompt and answer fill the model's context.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each, at least one.
        max_new_tokens: The most tokens of an answer.
    """
    context = context_of(model)
    limits = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
    result = [Answer((), False)] * len(prompts)
    for limit in sorted({limit for limit in limits if limit > 0}):  # one, unless a prompt comes close to the context
        chosen = [number for number, its in enumerate(limits) if its == limit]
        for number, answer in zip(
            chosen, _greedy(model, tokenizer, [prompts[number] for number in chosen], limit), strict=True
        ):
            result[number] = answer
    return result


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], limit: int
) -> list[Answer]:
    """:func:`answers` to prompts that all have ``limit`` tokens left."""
    from transformers import GenerationConfig

    stops, padding, width = stop_ids(tokenizer), pad_id(tokenizer), max(len(ids) for ids in prompts)
    padded = torch.tensor([[padding] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    plain = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=stops, pad_token_id=padding)
    own, model.generation_config = model.generation_config, plain  # the model's would add what `plain` leaves open
    try:
        written = model.generate(padded, attention_mask=mask, generation_config=plain)[:, width:].tolist()
    finally:
        model.generation_config = own
    ends = [next((place for place, token in enumerate(ids) if token in stops), None) for ids in written]
    return [Answer(tuple(ids[:end]), end is not None) for ids, end in zip(written, ends, strict=True)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Continues a prompt; yields the text in pieces, as it comes.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: What to continue, text or token ids; empty for the beginning of a document.
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
    ids = list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt) or [end_of_text_id(tokenizer)]
    context = context_of(model)
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
    stream = TextStream(tokenizer)
    yield from filter(None, (stream.add([token]) for token in tokens))
    if rest := stream.end():
        yield rest

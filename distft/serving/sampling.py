"""Which token comes next. V: size of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distft.serving.protocol import Sampling, Token

#: Sorting a vocabulary costs a hundred times what its likeliest few do, which nearly always hold all that top-p keeps.
_LIKELIEST = 256


def next_token(logits: Tensor, sampling: Sampling, counts: Mapping[int, int], generator: torch.Generator) -> Token:
    """One token, with what is asked for of its log-probability.

    A draw is the Gumbel-max trick (Gumbel, 1954; https://arxiv.org/abs/1611.00712): the largest of the logits, each
    with a random number of its own added. Every token of the vocabulary uses up one number of the generator, so that
    logits which differ in the last digits, as other company in a batch makes them, give the same token.

    Args:
        logits: (V,) in fp32, as the model gives them; not changed.
        sampling: How to choose.
        counts: How often the answer has each token that it has already.
        generator: Of the answer's random numbers, on the logits' device.
    """
    scores = _penalised(logits, sampling, counts)
    if sampling.temperature > 0:
        scores = (scores - scores.max()) / sampling.temperature
        if sampling.top_p < 1:
            scores = nucleus(scores, sampling.top_p)
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device)
        scores = scores - (-uniform.log()).log()
    chosen = int(scores.argmax())
    if sampling.top_logprobs is None:
        return Token(chosen)
    whole = logits.logsumexp(0)
    likeliest = logits.topk(min(sampling.top_logprobs, len(logits)))
    found = (likeliest.values - whole).tolist()
    return Token(chosen, float(logits[chosen] - whole), tuple(zip(likeliest.indices.tolist(), found, strict=True)))


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores (V,), minus infinity for all but the fewest likeliest tokens with ``top_p`` of the probability.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751.
    """
    chances = scores.softmax(0)
    found, places = chances.topk(min(_LIKELIEST, len(chances)))
    if found.sum() < top_p:
        found, places = chances.sort(descending=True)
    kept = places[found.cumsum(0) - found < top_p] if top_p > 0 else places[:1]
    return torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])


def _penalised(logits: Tensor, sampling: Sampling, counts: Mapping[int, int]) -> Tensor:
    """OpenAI's penalties: https://platform.openai.com/docs/api-reference/completions/create."""
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    if not counts or (frequency == 0 and presence == 0):
        return logits
    ids = torch.tensor(list(counts), device=logits.device)
    times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, -(frequency * times + presence))

"""Metrics of written answers: an answer beside the reference that the data gives.

BLEU and chrF are sacrebleu's, with its defaults (BLEU: tokenizer 13a, exponential smoothing; chrF2: characters up to
6-grams); their statistics are its own, and their scale is 0 .. 100. ROUGE is rouge_score's without stemming, which
knows only the letters a-z and digits: it says little about other scripts, chrF does. Exact match and token F1 are
SQuAD's.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_statistics(answer: str, reference: str, names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """The statistics of one answer for the metrics ``names``; a mean's are its value and 1.

    Args:
        answer: What the model wrote.
        reference: What the data says.
        names: Of bleu, chrf, rouge1, rouge2, rougeL, exact_match and token_f1; others are passed over.
    """
    wanted = set(names)
    answer, reference = answer.strip(), reference.strip()
    result = {
        name: np.array(_sacrebleu(name)._extract_corpus_statistics([answer], [[reference]])[0], dtype=np.float64)
        for name in ("bleu", "chrf")
        if name in wanted
    }
    means: dict[str, float] = {}
    if rouge := [name for name in ROUGE if name in wanted]:
        scores = _rouge().score(reference, answer)
        means |= {name: scores[name].fmeasure for name in rouge}
    if "exact_match" in wanted:
        means["exact_match"] = float(normalize(answer) == normalize(reference))
    if "token_f1" in wanted:
        means["token_f1"] = token_f1(answer, reference)
    return result | {name: np.array([value, 1.0]) for name, value in means.items()}


def bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corpus BLEU of summed statistics (Papineni et al., ACL 2002; sacrebleu: Post, WMT 2018)."""
    return _scores("bleu", sums)


def chrf(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corpus chrF2 of summed statistics (Popović, WMT 2015)."""
    return _scores("chrf", sums)


def normalize(text: str) -> str:
    """SQuAD v1.1's: lower case, without punctuation and articles, words one space apart (evaluate-v1.1.py)."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that answer and reference share, after :func:`normalize`.

    Where one of them has no words left, it is 1 if the other has none either, as in SQuAD v2.0: v1.1 would call a
    literal match of "The The" exact and wrong at once.
    """
    written, wanted = normalize(answer).split(), normalize(reference).split()
    if not written or not wanted:
        return float(written == wanted)
    shared = (Counter(written) & Counter(wanted)).total()
    return 2 * shared / (len(written) + len(wanted))  # = 2 P R / (P + R)


@functools.cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE))


def _scores(name: str, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of each vector of summed statistics, by what sacrebleu's own bootstrap calls."""
    flat = sums.reshape(-1, sums.shape[-1])
    metric = _sacrebleu(name)
    values = [metric._compute_score_from_stats(counts).score for counts in flat.tolist()]
    return np.array(values, dtype=np.float64).reshape(sums.shape[:-1])

"""Scoring a model folder on a split, and what the scores allow one to say: values with bootstrap intervals.

What is measured on a document are the statistics of :mod:`distft.task.metrics`; every value is a function of their
sums, and its interval comes from resampling documents, because the tokens of one document are not independent of each
other.
"""

from distft.evaluation.bootstrap import DocumentScore, Estimate, classes, difference, merge, summarise
from distft.evaluation.examples import Example, examples
from distft.evaluation.score import Scored, Subject, Written, guesses, score
from distft.evaluation.units import Question, Unit, deal, questions, units

__all__ = [
    "DocumentScore",
    "Estimate",
    "Example",
    "Question",
    "Scored",
    "Subject",
    "Unit",
    "Written",
    "classes",
    "deal",
    "difference",
    "examples",
    "guesses",
    "merge",
    "questions",
    "score",
    "summarise",
    "units",
]

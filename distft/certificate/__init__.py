"""The parity certificate: proof that whatever serves an export is the model that was trained.

Prompts of the validation split, the ids that the task's own template makes of them, and what the training engine
answers, token by token with log-probabilities. :mod:`~distft.certificate.witness` writes it with the weights as
training computed with them; :mod:`~distft.certificate.replay` asks a folder the same, and
:mod:`~distft.certificate.http` a server; :func:`compare` says what differs and why.
"""

from distft.certificate.compare import Finding, Reason, compare, proved, refuse
from distft.certificate.record import Ask, Certificate, Record, Reply, read

__all__ = ["Ask", "Certificate", "Finding", "Reason", "Record", "Reply", "compare", "proved", "read", "refuse"]

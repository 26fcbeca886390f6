"""The names and numbers of trials, as short as a person can tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distft.tuning.trials import Params, Trial


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Dotted names by as many of their last parts as tell them apart: ``learning_rate`` for ``train.learning_rate``."""
    whole = list(dict.fromkeys(names))
    return {name: _shortest(name, [other for other in whole if other != name]) for name in whole}


def _shortest(name: str, others: Sequence[str]) -> str:
    parts = name.split(".")
    for kept in range(1, len(parts)):
        short = ".".join(parts[-kept:])
        if not any(other == short or other.endswith(f".{short}") for other in others):
            return short
    return name


def varied(trials: Sequence[Trial]) -> list[str]:
    """The dotted names of what the trials vary, in the order of their first use."""
    return list(dict.fromkeys(name for trial in trials for name in trial.params))


def number(value: float) -> str:
    """A setting with three significant digits, whole numbers in full: ``32``, ``0.03``, ``3.1e-4``."""
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def score(value: float | None) -> str:
    """An objective with four significant digits, so that a column of them stands even; ``-`` where there is none."""
    return "-" if value is None else f"{value:#.4g}".rstrip(".")


def settings(params: Params) -> str:
    """``learning_rate 3.1e-4, batch_size 32``."""
    short = short_names(params)
    return ", ".join(f"{short[name]} {number(value)}" for name, value in params.items())

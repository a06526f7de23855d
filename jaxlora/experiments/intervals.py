"""Intervals for the difference of two evaluations: paired where they share examples, unpaired where they do not."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from scipy.special import stdtrit

from jaxlora.experiments.paired import FEWEST, difference
from jaxlora.experiments.thresholds import CONFIDENCE

Columns = Mapping[str, Sequence[Any]]


class Interval(NamedTuple):
    """New less old, in nats per token.

    Attributes:
        mean: the difference of eval/nll. low, high: its interval at `CONFIDENCE`.
        examples: how many it rests on (the fewer of the two, where they are not paired).
        paired: whether example by example.
    """

    mean: float
    low: float
    high: float
    examples: int
    paired: bool


def interval(old: Columns | None, new: Columns | None) -> Interval | None:
    """The interval of the difference of two evaluations.

    Paired, where they share at least `FEWEST` examples of equal numbers of tokens:

        D -+ t(1 - (1 - c) / 2, n_w - 1) SE,    n_w = (sum_e w_e)^2 / sum_e w_e^2

    with D and SE of `paired.difference` and n_w the number of equally long examples that would weigh as much. Otherwise
    from both means with their own errors, each likewise, and Welch's degrees of freedom.

    Args:
        old, new: columns "example", "nll" and "tokens"; None for an evaluation that is not there.
    Returns:
        The interval; None where one is missing, holds fewer than `FEWEST` examples, or numbers that are not finite.
    Source: Cochran 1977, section 2.11; Kish 1965, section 11.7 (n_w); Welch 1947.
    """
    if not _sound(old) or not _sound(new):
        return None
    tokens = dict(zip(old["example"], old["tokens"], strict=True))
    shared = [
        (count, tokens[example])
        for example, count in zip(new["example"], new["tokens"], strict=True)
        if example in tokens
    ]
    if len(shared) >= FEWEST and all(one == other for one, other in shared):
        found = difference(old, new)
        if found is None:
            return None
        return _around(
            found.mean, found.standard_error, _effective([w for w, _ in shared]) - 1, len(shared), True
        )
    return None


def unpaired(old: Columns | None, new: Columns | None) -> Interval | None:
    """Welch's interval of the difference of two token-weighted means over different examples; see `interval`."""
    parts = [_mean(columns) for columns in (old, new)]
    if any(part is None for part in parts):
        return None
    (a, a_error, a_free, a_n), (b, b_error, b_free, b_n) = (part for part in parts if part is not None)
    error = math.hypot(a_error, b_error)
    free = error**4 / (a_error**4 / a_free + b_error**4 / b_free) if error else min(a_free, b_free)
    return _around(b - a, error, free, min(a_n, b_n), False)


def _sound(columns: Columns | None) -> TypeGuard[Columns]:
    return columns is not None and all(name in columns for name in ("example", "nll", "tokens"))


def _effective(weights: Sequence[float]) -> float:
    w = np.asarray(weights, np.float64)
    return float(w.sum() ** 2 / (w @ w))


def _mean(columns: Columns | None) -> tuple[float, float, float, int] | None:
    """Mean, its error, degrees of freedom, examples."""
    if columns is None or not _sound(columns) or len(columns["nll"]) < FEWEST:
        return None
    values, weights = np.array(columns["nll"], np.float64), np.array(columns["tokens"], np.float64)
    if not np.isfinite(values).all():
        return None
    n = len(values)
    mean = float(weights @ values / weights.sum())
    squares = float(np.sum((weights * (values - mean)) ** 2))
    return mean, math.sqrt(n / (n - 1) * squares) / float(weights.sum()), _effective(weights.tolist()) - 1, n


def _around(mean: float, error: float, free: float, examples: int, paired: bool) -> Interval:
    reach = float(stdtrit(max(free, 1.0), (1 + CONFIDENCE) / 2)) * error
    return Interval(mean, mean - reach, mean + reach, examples, paired)

"""Metrics from sums: what an evaluation reports, and the file to add a metric to.

A metric is a function of an evaluation's totals. Add one here, under its name, and `eval.metrics` may ask for it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Totals(NamedTuple):
    """Sums over all trained tokens of an evaluation, in float64.

    Attributes:
        nll: negative log-likelihood in nats. correct: tokens whose likeliest prediction was right.
        weight: trained tokens.
    """

    nll: float
    correct: float
    weight: float


def nll(totals: Totals) -> float:
    """Mean negative log-likelihood in nats per trained token, never smoothed."""
    return totals.nll / totals.weight


def perplexity(totals: Totals) -> float:
    """exp(nll); infinite where that overflows."""
    try:
        return math.exp(nll(totals))
    except OverflowError:
        return math.inf


def token_accuracy(totals: Totals) -> float:
    """Share of trained tokens that the model predicts as the likeliest."""
    return totals.correct / totals.weight


METRICS: dict[str, Callable[[Totals], float]] = {
    "nll": nll,
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
}
"""By the name that `eval.metrics` uses; logged as eval/NAME."""

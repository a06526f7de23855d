"""Paired comparison of two evaluations of the same examples.

Examples differ far more from each other than a model does from itself a few steps later. Subtracting example by example
takes the first away: what is left says whether the second is real.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FEWEST = 3
"""Examples below which nothing is said of a spread."""


class Difference(NamedTuple):
    """New less old.

    Attributes:
        mean: difference of the token-weighted mean nll, in nats.
        standard_error: of that mean, over the draw of the examples.
        examples: how many both have.
    """

    mean: float
    standard_error: float
    examples: int

    @property
    def z(self) -> float:
        """The mean in standard errors; 0 where both are 0, infinite where only the error is."""
        if self.standard_error:
            return self.mean / self.standard_error
        return math.copysign(math.inf, self.mean) if self.mean else 0.0


def difference(
    old: Mapping[str, Sequence[Any]] | None, new: Mapping[str, Sequence[Any]] | None
) -> Difference | None:
    """How much the nll of the examples that both have changed.

    With w_e trained tokens and d_e the change of example e's mean nll, over n examples

        D = sum_e w_e d_e / sum_e w_e
        SE = sqrt(n / (n - 1) sum_e w_e^2 (d_e - D)^2) / sum_e w_e

    D is the change of eval/nll itself; SE is the linearised error of such a ratio of sums.

    Args:
        old, new: columns "example", "nll" (mean over the example's trained tokens) and "tokens", as files of eval/ have
            them; None for an evaluation that is not there.
    Returns:
        The difference; None when one is missing, a shared example's nll is not finite, or fewer than `FEWEST` are
        shared.
    Source: Cochran 1977, Sampling Techniques, section 2.11 (ratio estimator).
    """
    if old is None or new is None:
        return None
    before = dict(zip(old["example"], old["nll"], strict=True))
    rows = [
        (before[example], value, tokens)
        for example, value, tokens in zip(new["example"], new["nll"], new["tokens"], strict=True)
        if example in before
    ]
    if len(rows) < FEWEST or any(value is None for row in rows for value in row):
        return None
    first, second, weight = np.array(rows, np.float64).T
    change = second - first
    if not np.isfinite(change).all():
        return None
    mean = float(weight @ change / weight.sum())
    squares = float(np.sum((weight * (change - mean)) ** 2))
    error = math.sqrt(len(rows) / (len(rows) - 1) * squares) / float(weight.sum())
    return Difference(mean, error, len(rows))

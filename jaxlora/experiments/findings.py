"""What a rule says: a sentence with its numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One thing that a run's curves say.

    Attributes:
        kind: "divergence", "spike", "stuck", "risk", "steady", "convergence", "alike" (another run than the baseline),
            "eval", "overfitting", "plateau", "early_stop", "undertrained", "unfinished", "level" (where train and eval
            nll ended), or "data" (what cannot be told).
        text: in a person's words.
        numbers: what it rests on, by name.
    """

    kind: str
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)


def nats(value: float) -> str:
    """An nll to three digits: 1.21, 0.674, 12.3."""
    return f"{value:.3g}" if abs(value) < 0.9995 else f"{value:.2f}"


def times(factor: float) -> str:
    """ "2.4 times" """
    return f"{factor:.2g} times" if factor < 10 else f"{factor:,.0f} times"


def by(difference: float, low: float, high: float) -> tuple[str, str]:
    """A difference and its interval to as many digits as the interval's width makes sense of."""
    width = max(high - low, 1e-12)
    digits = min(6, max(2, 1 - math.floor(math.log10(width))))
    return f"{abs(difference):.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"

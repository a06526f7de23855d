"""The settings behind a logged learning rate: what a trainer's log doesn't say, but its numbers determine."""

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-4
"""Largest relative error of any logged rate for a schedule to be taken as the one."""


class Schedule(NamedTuple):
    """A schedule as Transformers has them: peak s / warmup up to `warmup`, then `kind`."""

    peak: float
    warmup: int
    kind: str


def recovered(steps: np.ndarray, rates: np.ndarray, total: int) -> Schedule | None:
    """The schedule that gives every logged rate.

    With s the scheduler's step, W the warmup, T the total, P the peak:

        s < W:       P s / W
        linear:      P (T - s) / (T - W)
        cosine:      P (1 + cos(pi (s - W) / (T - W))) / 2
        constant:    P

    A rate logged in the warmup gives P / W, those after it decide W and the kind. Some versions log the rate of the
    step (s = step - 1), others that of the next (s = step).

    Args:
        steps: [n] ascending.
        rates: [n] as logged.
        total: T.
    Returns:
        The schedule; None where the rates leave more than one open (none logged in the warmup, fewer than two after
        it), or fit none.
    """
    highest = int(np.argmax(rates))
    if total <= 0 or not (np.isfinite(rates).all() and (rates > 0).any()):
        return None
    if highest == 0 or len(rates) - highest < 2:
        return None
    # The peak may lie between two logged steps, on either side of the highest.
    after = int(steps[min(highest + 1, len(steps) - 1)])
    found: dict[tuple[float, int, str], float] = {}
    for shift in (0, 1):
        s = steps - shift
        if s[highest - 1] <= 0:
            continue
        slope = rates[highest - 1] / s[highest - 1]
        for warmup in range(int(s[highest - 1]) + 1, after + 1):
            peak = slope * warmup
            for kind, shape in _shapes(s, warmup, total).items():
                error = np.abs(peak * shape - rates).max() / rates.max()
                if error < TOLERANCE:
                    key = (_rounded(peak), warmup, kind)
                    found[key] = min(error, found.get(key, math.inf))
    if not found:
        return None
    best = min(found, key=lambda key: found[key])
    if any(abs(peak / best[0] - 1) > 1e-3 or kind != best[2] for peak, _, kind in found):
        return None  # more than one fits
    return Schedule(*best)


def _shapes(s: np.ndarray, warmup: int, total: int) -> dict[str, np.ndarray]:
    """Kind -> the rates as shares of the peak."""
    rising = s / warmup
    share = np.clip((s - warmup) / max(total - warmup, 1), 0, 1)
    decays = {"linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2, "constant": np.ones(len(s))}
    return {kind: np.where(s < warmup, rising, decay) for kind, decay in decays.items()}


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")

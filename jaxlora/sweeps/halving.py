"""Who goes on at a rung: the best by eval nll, and whoever cannot be told from the last of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.experiments.paired import difference
from jaxlora.sweeps.trials import Halving

TIED = 1.96
"""Standard errors of the paired difference within which two trials are tied: 95 % of a normal distribution."""

Columns = Mapping[str, Sequence[Any]]


def mean(columns: Columns) -> float:
    """The token-weighted mean nll of an evaluation's columns; infinite where it is not finite."""
    pairs = list(zip(columns["nll"], columns["tokens"], strict=True))
    total = sum(tokens for _, tokens in pairs)
    value = sum(nll * tokens for nll, tokens in pairs if nll is not None) / max(total, 1)
    broken = any(nll is None or not math.isfinite(nll) for nll, _ in pairs)
    return math.inf if broken else value


def dropped(halving: Halving, found: Mapping[str, Columns]) -> dict[str, str]:
    """The trials that do not go on.

    Args:
        found: trial -> the columns "example", "nll", "tokens" of its evaluation, of the same examples for all.
    Returns:
        Name -> why, with the numbers.
    """
    out = {name: "its eval nll is not finite" for name in found if math.isinf(mean(found[name]))}
    ranked = sorted((name for name in found if name not in out), key=lambda name: mean(found[name]))
    kept = ranked[: halving.kept(len(found))]
    for name in ranked[len(kept) :]:
        last = kept[-1]
        paired = difference(found[last], found[name])
        tied = paired is None or abs(paired.z) < TIED
        if tied and not halving.drop_ties:
            continue
        told = (
            f"eval nll {mean(found[name]):.4f}, and the last of {len(kept)} kept has {mean(found[last]):.4f}"
        )
        if paired is not None:
            told += f" (+{paired.mean:.4f} ± {TIED * paired.standard_error:.4f}, {paired.examples} examples)"
        out[name] = told
    return out

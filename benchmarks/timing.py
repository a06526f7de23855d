"""Sides that are timed in turn, and what comes of it: medians, ranges, ratios."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def in_turn(
    sides: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], Any] = time.perf_counter
) -> dict[str, list[Any]]:
    """Seconds of each side in each round, after a round that is not counted; who goes first alternates.

    A side has to wait for what it started: `jax.block_until_ready`. A clock may tell several times, as an array.
    """
    taken: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            began = clock()
            sides[name]()
            if turn:
                taken[name].append(clock() - began)
    return taken


def spread(values: Iterable[float]) -> dict[str, float]:
    """The median and the range."""
    found = sorted(values)
    return {"median": statistics.median(found), "least": found[0], "most": found[-1]}


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Median and range, over the rounds, of one side's value over the other's in the same round."""
    return spread(a / b for a, b in zip(of, to, strict=True))


def shown(found: Mapping[str, float], digits: int = 2, unit: float = 1.0) -> str:
    """ "1.52 (1.48-1.60)": a `spread`, in units of `unit`."""
    median, least, most = (f"{found[key] / unit:,.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least}-{most})"

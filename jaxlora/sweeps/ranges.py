"""Ranges that values are drawn from, by chance or by a search."""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any

from jaxlora.config.schema import find_key
from jaxlora.core.errors import InputError

KINDS = ("log_uniform", "uniform", "choice")
DIGITS = 3
"""Significant digits of a drawn number: more would tell trials apart that are the same to any purpose."""
TRIES = 1000
"""Draws after which no more distinct ones are expected."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Where the values of a key come from.

    Attributes:
        kind: "log_uniform", "uniform" or "choice".
        values: what may be drawn for a choice; else the lowest and the highest value.
        whole: whether the key takes integers.
    """

    kind: str
    values: tuple[Any, ...]
    whole: bool

    def draw(self, source: random.Random) -> Any:
        """One value."""
        if self.kind == "choice":
            return self.values[int(source.random() * len(self.values))]
        low, high = self.values
        share = source.random()
        drawn = low * (high / low) ** share if self.kind == "log_uniform" else low + (high - low) * share
        return self.near(drawn)

    def near(self, value: float) -> Any:
        """The value in the key's own type, and no longer than a person would write it."""
        low, high = self.values
        value = round(value) if self.whole else float(f"{value:.{DIGITS}g}")
        return min(max(value, low), high)


def ranges(section: str, given: Mapping[str, Any]) -> dict[str, Range]:
    """Dotted key -> its range.

    Args:
        section: of the config, for errors: "sweep.random.ranges".
        given: dotted key -> ("log_uniform", LOW, HIGH), ("uniform", LOW, HIGH) or ("choice", VALUE, ...).
    Raises:
        InputError: an unknown key, no such kind of range, or ends that the key does not take.
    """
    return {path: _range(section, path, value) for path, value in given.items()}


def _range(section: str, path: str, given: Any) -> Range:
    key, name = find_key(path), f"{section}['{path}'] = {given!r}"
    if not isinstance(given, list | tuple) or not given or given[0] not in KINDS:
        raise InputError(
            f"{name} is no range.\nWrite ('log_uniform', LOW, HIGH), ('uniform', LOW, HIGH) or ('choice', VALUE, ...)."
        )
    kind, values = given[0], tuple(key.check(value) for value in given[1:])
    if kind == "choice":
        if not values or any(values.count(value) > 1 for value in values):
            raise InputError(f"{name}: a choice needs different values: ('choice', VALUE, ...).")
        return Range(kind, values, False)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    lowest = 0 if kind == "log_uniform" else -math.inf
    if len(values) != 2 or not numbers or not lowest < values[0] < values[1]:
        above = ", above 0," if kind == "log_uniform" else ""
        raise InputError(
            f"{name}: it goes from a number{above} to a larger one: ('{kind}', LOW, HIGH).\n"
            "For values that are no numbers, write ('choice', VALUE, ...)."
        )
    return Range(kind, values, isinstance(values[0], int))


def draws(found: Mapping[str, Range], count: int, seed: int) -> list[dict[str, Any]]:
    """Draws trials that are all different; the first ones of a longer list are those of a shorter one.

    Args:
        found: dotted key -> range.
        count: how many.
        seed: of the draws.
    Returns:
        Dotted key -> value, for each.
    Raises:
        InputError: there are not so many different ones.
    """
    source = random.Random(seed)
    drawn: list[dict[str, Any]] = []
    for _ in range(TRIES + count):
        one = {path: found[path].draw(source) for path in found}
        if one not in drawn:
            drawn.append(one)
        if len(drawn) == count:
            return drawn
    raise InputError(
        f"sweep.random.count = {count}, but these ranges gave only {len(drawn)} different trials.\n"
        f"Set it to {len(drawn)} or less, or widen the ranges."
    )

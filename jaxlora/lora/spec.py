"""What a LoRA adapter is: rank, scale, dropout, and the projections it sits on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxlora.core.errors import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a decoder layer that can carry an adapter, in the order in which they run."""

ALL_LINEAR = "all-linear"
SCALINGS = ("alpha/r", "rslora")


def resolve_targets(targets: str | Iterable[str]) -> tuple[str, ...]:
    """Turns what a person writes into target names.

    Args:
        targets: "all-linear" (all seven projections), names separated by commas, or several names.
    Returns:
        The names without repetition, in the order of `TARGETS`.
    Raises:
        InputError: no name, or one that is not in `TARGETS`.
    """
    names = targets.replace(",", " ").split() if isinstance(targets, str) else list(targets)
    if ALL_LINEAR in names:
        names = [name for name in names if name != ALL_LINEAR] + list(TARGETS)
    unknown = sorted({str(name) for name in names if name not in TARGETS})
    if unknown or not names:
        found = (
            f"unknown lora.targets {', '.join(map(repr, unknown))}" if unknown else "lora.targets is empty"
        )
        raise InputError(f"{found}; allowed are {ALL_LINEAR!r} or some of {', '.join(TARGETS)}.")
    return tuple(name for name in TARGETS if name in names)


@dataclass(frozen=True)
class LoraSpec:
    """The constants of an adapter: `y = x W + scale * dropout(x) a b`.

    Attributes:
        rank: R, the inner size of every pair.
        alpha: numerator of the scale; its denominator is set by `scaling`.
        dropout: probability in [0, 1) with which an input element of the adapter is dropped in training.
        targets: names out of `TARGETS`; put into their order.
        scaling: "alpha/r" (Hu et al. 2021, section 4.1) or "rslora" (alpha / sqrt(R), Kalajdzievski 2023).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    scaling: str = "alpha/r"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"lora.rank is {self.rank!r}; it must be a positive integer.")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise InputError(f"lora.alpha is {self.alpha!r}; it must be a positive number.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout!r}; it must be at least 0 and below 1.")
        if self.scaling not in SCALINGS:
            raise InputError(
                f"lora.scaling is {self.scaling!r}; allowed are {' and '.join(map(repr, SCALINGS))}."
            )
        object.__setattr__(self, "targets", resolve_targets(self.targets))

    @property
    def scale(self) -> float:
        """What the product of the pair is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

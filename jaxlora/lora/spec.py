"""What a LoRA adapter is: rank, scale, dropout, and the projections it sits on."""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from jaxlora.core.errors import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a decoder layer that can carry an adapter, in the order in which they run."""

MODULES = {name: f"{'mlp' if i > 3 else 'self_attn'}.{name}" for i, name in enumerate(TARGETS)}
"""Each projection's module within a layer, which patterns are matched with."""

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
    """The constants of an adapter: `y = x W + scale * dropout(x) a b`, and with DoRA `y = g * (x W + ...)`.

    Attributes:
        rank: R, the inner size of every pair.
        alpha: numerator of the scale; its denominator is set by `scaling`.
        dropout: probability in [0, 1) with which an input element of the adapter is dropped in training.
        targets: names out of `TARGETS`; put into their order.
        scaling: "alpha/r" (Hu et al. 2021, section 4.1) or "rslora" (alpha / sqrt(R), Kalajdzievski 2023).
        use_dora: whether each adapted matrix has a trained magnitude beside the pair (Liu et al. 2024, equation 5).
        rank_pattern, dropout_pattern: "PATTERN=VALUE", another rank or dropout for the projections whose name
            ("q_proj") or module ("mlp.down_proj") matches; `*` matches any characters, and the first match counts.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    scaling: str = "alpha/r"
    use_dora: bool = False
    rank_pattern: tuple[str, ...] = ()
    dropout_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_rank(self.rank, "lora.rank is")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise InputError(f"lora.alpha is {self.alpha!r}; it must be a positive number.")
        _check_dropout(self.dropout, "lora.dropout is")
        if self.scaling not in SCALINGS:
            raise InputError(
                f"lora.scaling is {self.scaling!r}; allowed are {' and '.join(map(repr, SCALINGS))}."
            )
        object.__setattr__(self, "targets", resolve_targets(self.targets))
        _ = self.ranks, self.dropouts  # a pattern that is wrong is said now

    @property
    def scale(self) -> float:
        """What the product of a pair of rank `rank` is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return self._scale(self.rank)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each target."""
        return self._by_target("rank_pattern", self.rank, int, _check_rank)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each target, from its own rank (as PEFT does)."""
        return {name: self._scale(rank) for name, rank in self.ranks.items()}

    @property
    def dropouts(self) -> dict[str, float]:
        """The dropout of each target."""
        return self._by_target("dropout_pattern", self.dropout, float, _check_dropout)

    def with_rank(self, rank: int) -> "LoraSpec":
        """The spec of adapters with one rank, whose scale is that of this spec's `rank`: alpha follows."""
        ratio = rank / self.rank if self.scaling == "alpha/r" else math.sqrt(rank / self.rank)
        return replace(self, rank=rank, alpha=self.alpha * ratio, rank_pattern=())

    def _scale(self, rank: int) -> float:
        return self.alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))

    def _by_target(
        self, field: str, default: Any, kind: Callable[[str], Any], check: Callable[[object, str], None]
    ) -> dict[str, Any]:
        """What each target gets: the value of the first pattern that matches it, else the default."""
        found = dict.fromkeys(self.targets, default)
        for entry in reversed(getattr(self, field)):
            pattern, _, text = str(entry).partition("=")
            value: Any = text
            with contextlib.suppress(ValueError):
                value = kind(text)
            check(value, f"lora.{field} has {entry!r}, and its value is")
            matching = [
                name
                for name in self.targets
                if any(fnmatch.fnmatchcase(known, pattern.strip()) for known in (name, MODULES[name]))
            ]
            if not matching:
                modules = ", ".join(MODULES[name] for name in self.targets)
                raise InputError(
                    f"lora.{field} has {entry!r}, which matches none of the adapted modules: {modules}."
                )
            found |= dict.fromkeys(matching, value)
        return found


def _check_rank(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} {value!r}; it must be a positive integer.")


def _check_dropout(value: object, what: str) -> None:
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]
        raise InputError(f"{what} {value!r}; it must be at least 0 and below 1.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""The trials of a sweep, which of them may be trained together, and which are kept.

A stack is one compiled program over one base and the same rows, so its trials may differ only in what the program
takes as numbers or what the host decides for each by itself. Everything else makes another group.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from jaxlora.config.schema import Config, to_dict
from jaxlora.core.errors import InputError
from jaxlora.core.tree import leaves

MAY_DIFFER = frozenset(
    """
    lora.rank lora.rank_pattern lora.alpha lora.scaling lora.dropout lora.dropout_pattern lora.init_from
    optim.learning_rate optim.warmup_steps optim.final_fraction optim.weight_decay optim.b1 optim.b2 optim.eps
    optim.clip_norm optim.loraplus_lr_ratio optim.label_smoothing
    train.epochs train.max_steps
    eval.every eval.every_epochs eval.adaptive eval.finest eval.generate_every
    checkpoint.every checkpoint.keep checkpoint.best checkpoint.best_by checkpoint.best_mode
    stop.patience stop.by stop.min_delta stop.min_delta_unit stop.min_steps
    guard.on_spike guard.on_nonfinite guard.on_divergence guard.threshold guard.max_skipped guard.max_rollbacks
    guard.rollback_factor
    log.every journal.baseline journal.hypothesis seed
    """.split()
)
"""The keys in which the trials of one stack may differ: a key that is not here makes another group."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: the run's, and that of its folder in the sweep's.
        changes: dotted key -> value, of what makes it differ from the base config.
        config: the whole, checked.
    """

    name: str
    changes: Mapping[str, Any]
    config: Config


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value of a whole config, as JSON has it."""
    return {".".join(path): value for path, value in leaves(to_dict(config))}


def stack_key(config: Config) -> Hashable:
    """Equal for trials that may be one stack.

    A held-out part that is drawn from data.train is drawn by the seed: with another one the rows are others, to train
    on and to evaluate on.
    """
    values = flat(config)
    apart = {key for key in values if key not in MAY_DIFFER}
    if not config.data.eval:
        apart.add("seed")
    return tuple((key, _hashable(values[key])) for key in sorted(apart))


def groups(trials: Iterable[Trial]) -> list[tuple[Trial, ...]]:
    """The trials that may be one stack, together; both in order of first appearance."""
    found: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        found.setdefault(stack_key(trial.config), []).append(trial)
    return [tuple(group) for group in found.values()]


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: at each rung the worst trials are dropped.

    Attributes:
        rungs: fractions of a trial's own run, ascending, each above 0 and below 1.
        eta: the best ceil(n / eta) of a rung's n trials are kept.
        drop_ties: whether a trial is dropped although it is statistically tied with the last kept one.
    Raises:
        InputError: no halving can be made of them.
    """

    rungs: tuple[float, ...]
    eta: float = 2.0
    drop_ties: bool = False

    def __post_init__(self) -> None:
        told = ", ".join(f"{rung:g}" for rung in self.rungs)
        if not self.rungs or not all(0 < rung < 1 for rung in self.rungs):
            raise InputError(
                f"sweep.halving.rungs = ({told}): rungs are fractions of a run, each above 0 and below 1.\n"
                "Set them in the config file, or with --config.sweep.halving.rungs=0.25,0.5."
            )
        if any(later <= earlier for earlier, later in zip(self.rungs, self.rungs[1:], strict=False)):
            raise InputError(
                f"sweep.halving.rungs = ({told}): each rung must be later than the one before.\n"
                f"Set --config.sweep.halving.rungs={','.join(f'{rung:g}' for rung in sorted(set(self.rungs)))}."
            )
        if not self.eta >= 2:
            raise InputError(
                f"sweep.halving.eta = {self.eta:g}: below 2, a rung would cost more than it drops.\n"
                "Set --config.sweep.halving.eta=2, which keeps the better half."
            )

    def step(self, rung: int, total: int) -> int:
        """The step of a rung, by its index, in a run of `total` steps."""
        return math.ceil(round(self.rungs[rung] * total, 6))  # 0.07 of 100 is 7, whatever float64 makes of it

    def kept(self, trials: int) -> int:
        """How many of a rung's trials are kept, ties apart."""
        return math.ceil(round(trials / self.eta, 6))

    def check(self, trial: Trial, total: int) -> None:
        """Refuses rungs at which a trial of `total` steps cannot be judged yet.

        Raises:
            InputError: the first rung comes before the end of its warmup.
        """
        first, warmup = self.step(0, total), trial.config.optim.warmup_steps
        if first <= warmup:
            later = min(0.99, math.ceil(100 * (warmup + 1) / total) / 100)
            raise InputError(
                f"sweep.halving.rungs: the first, {self.rungs[0]:g}, is step {first} of {total}, and trial "
                f"{trial.name} warms up for {warmup}: it would be judged before it has trained at its rate.\n"
                f"Set the first rung to {later:g} or more, or optim.warmup_steps below {first}."
            )

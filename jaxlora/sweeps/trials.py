"""The trials of a sweep, which of them may be trained together, and which are kept.

A stack is one compiled program over one base and the same rows, so its trials may differ only in what the program
takes as numbers or what the host decides for each by itself. Everything else makes another group.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from jaxlora.config.schema import Config, find_key, to_dict
from jaxlora.core.errors import InputError
from jaxlora.core.tree import leaves

LONGEST_NAME = 80
"""Characters of a trial's name; a longer one becomes its number."""

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


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """A base config with other values of some keys.

    Args:
        base: whole, as nested dicts.
        changes: dotted key -> value.
    Raises:
        InputError: a key that does not exist, a value that it does not take, or keys that contradict each other.
    """
    nested = {name: dict(child) if isinstance(child, Mapping) else child for name, child in base.items()}
    for path, value in changes.items():
        key = find_key(path)
        section = nested.setdefault(path.rpartition(".")[0], {}) if "." in path else nested
        section[key.name] = key.check(value)
    return Config.from_dict(nested)


def check_distinct(trials: Sequence[Trial]) -> None:
    """Refuses two trials that would be one run twice, or would have one folder.

    Raises:
        InputError: naming the two.
    """
    by_config: dict[Hashable, str] = {}
    names = collections.Counter(trial.name for trial in trials)
    for name, count in names.items():
        if count > 1:
            raise InputError(f"{count} trials are called {name}: give each a name of its own, or none.")
    for trial in trials:
        values = {key: value for key, value in flat(trial.config).items() if not key.startswith("journal.")}
        key = tuple((name, _hashable(value)) for name, value in values.items())
        if (other := by_config.setdefault(key, trial.name)) != trial.name:
            same = f"both have {told(trial.changes)}" if trial.changes else "both are the base config"
            raise InputError(
                f"the trials {other} and {trial.name} are the same run: {same}.\nLeave one of them out; to see how "
                "far chance goes, give it another seed."
            )


# ---- names ---------------------------------------------------------------------------------------------------------


def named(trials: Sequence[Mapping[str, Any]], taken: Iterable[str] = ()) -> list[str]:
    """A name for each trial, short, readable and fit for a folder, from what makes it differ.

    {"optim.learning_rate": 2e-4, "lora.rank": 16} is "learning_rate=0.0002,rank=16".

    Args:
        trials: their changes, dotted key -> value.
        taken: names that others have already.
    """
    used, names = set(taken), []
    for number, changes in enumerate(trials, len(used) + 1):
        name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", told(changes, trials)) or "base"
        if len(name) > LONGEST_NAME:
            name = f"trial-{number:02}"
        others = (f"{name}-{copy}" for copy in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], others) if free not in used))
        used.add(names[-1])
    return names


def told(changes: Mapping[str, Any], among: Iterable[Mapping[str, Any]] = ()) -> str:
    """Changes in short, but for what only the journal reads: "learning_rate=0.0002,rank=16".

    Args:
        among: the changes of all trials: keys whose last words coincide there are written out.
    """
    keys = {key for trial in (changes, *among) for key in trial}
    words = collections.Counter(key.rpartition(".")[2] for key in keys)
    return ",".join(
        f"{key if words[key.rpartition('.')[2]] > 1 else key.rpartition('.')[2]}={shown(value)}"
        for key, value in changes.items()
        if not key.startswith("journal.")
    )


def shown(value: Any) -> str:
    """A value as a person would write it: 0.0002, 2e-05, true, none, q_proj+v_proj, the last part of a path."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, list | tuple):
        return "+".join(map(shown, value))
    return str(value).rstrip("/").rpartition("/")[2]


# ---- groups --------------------------------------------------------------------------------------------------------


def stack_key(config: Config) -> tuple[tuple[str, Hashable], ...]:
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


# ---- halving -------------------------------------------------------------------------------------------------------


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

"""A search: Optuna proposes waves of trials, from what came of the waves before.

A wave's proposals follow from the ended trials and the wave's number alone: nothing of Optuna's is kept between waves,
so a search that was killed goes on as if it had not been.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.sweeps.ranges import Range

SAMPLERS = ("tpe", "qmc", "random")


@dataclasses.dataclass(frozen=True)
class Search:
    """What to search for, and how.

    Attributes:
        ranges: dotted key -> range.
        sampler: one of `SAMPLERS`: Parzen estimators, a sequence that fills the space evenly, or chance.
        waves: how many rounds of proposals. trials: proposals a wave. seed: of the sampler.
    """

    ranges: Mapping[str, Range]
    sampler: str
    waves: int
    trials: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Told:
    """What came of a trial.

    Attributes:
        changes: dotted key -> value.
        nll: its best eval/nll; None when none was finite.
        dropped: the step at which a halving dropped it; None for one that went to its end.
    """

    changes: Mapping[str, Any]
    nll: float | None
    dropped: int | None = None


def propose(search: Search, wave: int, before: Sequence[Told]) -> list[dict[str, Any]]:
    """The trials of a wave, all different and none of them tried before; fewer where the ranges hold no more.

    Args:
        wave: its number, from 0.
        before: what came of all trials of the waves before, in their order.
    Returns:
        Dotted key -> value, for each.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=_sampler(search, wave), direction="minimize")
    distributions = {path: _distribution(found) for path, found in search.ranges.items()}
    for one in before:
        study.add_trial(_told(search, one, distributions))
    tried = [dict(one.changes) for one in before]
    found: list[dict[str, Any]] = []
    for _ in range(20 * search.trials):
        if len(found) == search.trials:
            break
        asked = study.ask(distributions).params
        changes = {path: _near(search.ranges[path], value) for path, value in asked.items()}
        if changes not in tried:
            tried.append(changes)
            found.append(changes)
    return found


def _sampler(search: Search, wave: int) -> Any:
    import optuna

    seed = search.seed + 1000 * wave
    if search.sampler == "tpe":
        # The first wave is drawn by chance, what failed in it or not. Proposals of one wave don't know of each other's
        # outcome: the liar keeps them apart.
        first = search.trials if wave == 0 else 1
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, constant_liar=True)
    if search.sampler == "qmc":
        with warnings.catch_warnings():  # its interface may change, says Optuna
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=search.seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _distribution(found: Range) -> Any:
    import optuna

    if found.kind == "choice":
        return optuna.distributions.CategoricalDistribution(range(len(found.values)))
    low, high = found.values
    kind = optuna.distributions.IntDistribution if found.whole else optuna.distributions.FloatDistribution
    return kind(low, high, log=found.kind == "log_uniform")


def _near(found: Range, value: Any) -> Any:
    return found.values[value] if found.kind == "choice" else found.near(value)


def _told(search: Search, one: Told, distributions: Mapping[str, Any]) -> Any:
    import optuna

    states = optuna.trial.TrialState
    finite = one.nll if one.nll is not None and math.isfinite(one.nll) else None
    state = states.FAIL if finite is None else states.COMPLETE if one.dropped is None else states.PRUNED
    params = {
        path: found.values.index(one.changes[path]) if found.kind == "choice" else one.changes[path]
        for path, found in search.ranges.items()
    }
    return optuna.trial.create_trial(
        params=params,
        distributions=dict(distributions),
        state=state,
        value=finite if state == states.COMPLETE else None,
        intermediate_values={} if finite is None or one.dropped is None else {one.dropped: finite},
    )

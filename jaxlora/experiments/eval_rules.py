"""What the evaluations say: better or worse than the baseline, overfitting, plateau, an end too early, or not yet.

Each rule is one function with its formula; the numbers at which it speaks are in thresholds.py. Below
`FEWEST_EVALUATIONS` none of them speaks of a course.
"""

from functools import cached_property

import numpy as np

from jaxlora.experiments import shapes
from jaxlora.experiments.baseline import same_eval_data
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.findings import Finding, by, nats
from jaxlora.experiments.intervals import Columns, Interval, interval, unpaired
from jaxlora.experiments.paired import difference
from jaxlora.experiments.records import Run
from jaxlora.experiments.thresholds import (
    FALLING_NOISE,
    FALLING_SHARE,
    FEWEST_EVALUATIONS,
    FLAT_SHARE,
    FLAT_STEPS,
    IN_A_ROW,
    NEGLIGIBLE,
    OVERFIT_AFTER,
    OVERFIT_ERRORS,
    OVERFIT_NOISE,
    OVERFIT_SHARE,
    UNPAIRED_NEGLIGIBLE,
    VERY_EARLY,
)

_KNOWN_NOISE = 6
"""Evaluations from which their second differences tell noise from bend."""


class Evaluations:
    """A run's evaluations.

    Attributes:
        run: whose. name: "eval/nll", or "eval/loss" where that is all there is; "" where there is nothing.
        steps: [E] of those that are finite. values: [E] nats per token.
    """

    def __init__(self, run: Run):
        self.run = run
        self.name = next((name for name in ("eval/nll", "eval/loss") if name in run.eval.values), "")
        steps, values = run.eval.of(self.name)
        finite = np.isfinite(values)
        self.steps, self.values = steps[finite], values[finite]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def enough(self) -> bool:
        """Whether there are as many as a course takes."""
        return len(self) >= FEWEST_EVALUATIONS

    @cached_property
    def lowest(self) -> int:
        """The place of the best one (the first of several)."""
        return int(np.argmin(self.values))

    @property
    def best(self) -> float:
        """The lowest nll."""
        return float(self.values[self.lowest])

    @property
    def best_step(self) -> int:
        """Its step."""
        return int(self.steps[self.lowest])

    @property
    def spacing(self) -> float:
        """Steps from one to the next, the median; 0 for fewer than two."""
        return float(np.median(np.diff(self.steps))) if len(self) > 1 else 0.0

    @cached_property
    def noise(self) -> float:
        """Standard deviation around their course; 0 where there are too few to tell."""
        return shapes.noise(self.values) if len(self) >= _KNOWN_NOISE else 0.0

    @cached_property
    def best_examples(self) -> Columns | None:
        """The per-example columns of the best one, None where there are none."""
        return losses(self.run, self.best_step)


def losses(run: Run, step: int) -> Columns | None:
    """The per-example losses of one evaluation, None where they are not there or not what they should be."""
    found = run.examples(step)
    if found is None or not found.keys() >= {"example", "nll", "tokens"}:
        return None
    numbers = all(type(v) is float or type(v) is int for name in ("nll", "tokens") for v in found[name])
    known = all(type(v) is int or type(v) is str for v in found["example"])
    return found if numbers and known and min(found["tokens"]) > 0 else None


def share_of(nll: float, share: float) -> float:
    """A share of an nll, of one nat where it is less: near zero, nobody cares for shares."""
    return share * max(nll, 1.0)


# ---- against the baseline ------------------------------------------------------------------------------------------


def compared(new: Evaluations, old: Evaluations) -> Finding | None:
    """Better, worse or no difference in eval nll, each at its best evaluation.

    Over shared examples: better or worse where the interval of `intervals.interval` leaves out 0 and the difference is
    at least NEGLIGIBLE of the baseline's nll. Else unpaired: with Welch's interval where both have examples; without
    any interval, lower or higher from UNPAIRED_NEGLIGIBLE on.
    """
    if not len(new) or not len(old) or new.name != old.name:
        return None
    same = same_eval_data(old.run, new.run)
    found = interval(old.best_examples, new.best_examples) if same is not False else None
    if found:
        return _paired(new, old, found)
    why = "other eval data" if same is False else "no per-example losses of the same examples"
    welch = unpaired(old.best_examples, new.best_examples)
    change = new.best - old.best
    numbers = {"difference": change, "new": new.best, "baseline": old.best, "paired": 0.0}
    both = f"{_level(new.best, old.best)} against {_level(old.best, new.best)}"
    if welch:
        _, around = by(change, welch.low, welch.high)
        numbers |= {"low": welch.low, "high": welch.high}
        away = welch.low > 0 or welch.high < 0
        enough = away and abs(change) >= share_of(old.best, NEGLIGIBLE)
        told = f"unpaired, since {why}: 95 % interval of the difference {around}"
    else:
        enough = abs(change) >= share_of(old.best, UNPAIRED_NEGLIGIBLE)
        told = f"unpaired, since {why}; no interval"
    words = ("lower eval nll" if change < 0 else "higher eval nll") if enough else "about the same eval nll"
    return Finding("eval", f"{words}: {both} ({told})", numbers)


def _paired(new: Evaluations, old: Evaluations, found: Interval) -> Finding:
    size, around = by(found.mean, found.low, found.high)
    numbers = {
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "examples": found.examples,
        "new": new.best,
        "baseline": old.best,
        "paired": 1.0,
    }
    told = f"95 % interval {around}, paired over {found.examples:,} examples"
    both = f"{_level(new.best, old.best)} against {_level(old.best, new.best)}"
    if found.low <= 0 <= found.high:
        text = f"no difference in eval nll: {both} ({told})"
    elif abs(found.mean) < share_of(old.best, NEGLIGIBLE):
        text = f"no difference in eval nll that matters: {both} ({told})"
    else:
        text = f"eval nll {'better' if found.mean < 0 else 'worse'} by {size}: {both} ({told})"
        numbers["significant"] = 1.0
    return Finding("eval", text, numbers)


def _level(value: float, other: float) -> str:
    """An nll to two digits after the point, more where that would not tell it from the other."""
    digits = 2 if min(value, other) >= 0.1 else 4
    while digits < 4 and f"{value:.{digits}f}" == f"{other:.{digits}f}":
        digits += 1
    return f"{value:.{digits}f}"


# ---- its course ----------------------------------------------------------------------------------------------------


def overfitting(evals: Evaluations, curve: Curve) -> Finding | None:
    """Overfitting: eval nll rises since its minimum while train nll falls.

    With per-example losses: the paired rise from the minimum is above OVERFIT_ERRORS standard errors at the last
    IN_A_ROW evaluations, and at least NEGLIGIBLE of the minimum. Without: the minimum is OVERFIT_AFTER evaluations ago
    or more, and the median of the last three lies above it by OVERFIT_SHARE. Either way by OVERFIT_NOISE deviations of
    the evaluations' noise (with examples, of those since the minimum), and never where train nll did not fall. What the
    run's own alarm recorded is taken as it is.
    """
    recorded = evals.run.record.get("overfit")
    if isinstance(recorded, dict) and len(evals):
        since, risen = recorded.get("since"), recorded.get("eval_rise")
        if isinstance(since, int) and isinstance(risen, float):
            return _overfits(since, risen, evals)
    if not evals.enough:
        return None
    place = evals.lowest
    after = evals.values[place + 1 :]
    if len(after) < IN_A_ROW or not _train_fell(curve, evals.best_step):
        return None
    rise = float(np.median(after[-3:]) - evals.best)
    if rise < share_of(evals.best, NEGLIGIBLE):
        return None
    if evals.best_examples is not None:
        found = [difference(evals.best_examples, losses(evals.run, int(s))) for s in evals.steps[-IN_A_ROW:]]
        certain = all(one is not None and one.z > OVERFIT_ERRORS for one in found)
        if not certain or rise < OVERFIT_NOISE * shapes.noise(evals.values[place:]):
            return None
        return _overfits(evals.best_step, float(after[-1] - evals.best), evals)
    least = max(share_of(evals.best, OVERFIT_SHARE), OVERFIT_NOISE * evals.noise)
    if len(after) < OVERFIT_AFTER or rise < least:
        return None
    return _overfits(evals.best_step, rise, evals)


def _overfits(since: int, rise: float, evals: Evaluations) -> Finding:
    rises = f"eval nll rises by {nats(rise)} from {nats(evals.best)} while train nll falls"
    text = f"overfits since step {since:,}: {rises}"
    return Finding("overfitting", text, {"since": since, "rise": rise, "lowest": evals.best})


def _train_fell(curve: Curve, since: int) -> bool:
    steps, nll = curve.run.eval.of("train_eval/nll")
    later = nll[steps >= since]
    if len(later) > 1:
        return bool(later[-1] < later[0])
    fall = curve.fall[curve.steps >= since] if len(curve) else curve.values
    return bool(len(fall) > 1 and fall[-1] < fall[0])


def still_falling(evals: Evaluations) -> float:
    """How much eval nll fell over the last third of the steps, 0 where that is not falling:

    fall = nll(last evaluation in the first two thirds) - nll(last) >= FALLING_SHARE nll
    and >= FALLING_NOISE sqrt(2) noise;  the last is the lowest, and no lower than the one before by chance:
    where the noise is not known, each of the last three is lower than the one before
    """
    if not evals.enough:
        return 0.0
    values, steps = evals.values, evals.steps
    # At least the one before the last: evaluations may be few.
    before = max(0, min(int(np.searchsorted(steps, steps[-1] * 2 / 3, side="right")) - 1, len(steps) - 2))
    fall = float(values[before] - values[-1])
    if values[-1] > values.min() + evals.noise or fall < share_of(float(values[-1]), FALLING_SHARE):
        return 0.0
    if evals.noise:
        return fall if fall >= FALLING_NOISE * 2**0.5 * evals.noise else 0.0
    return fall if (np.diff(values[-3:]) < 0).all() else 0.0


def plateau(evals: Evaluations) -> Finding | None:
    """Plateau: over the last FLAT_STEPS of the run or more, all evaluations lie within FLAT_SHARE of their median."""
    if not evals.enough or still_falling(evals):
        return None
    values, steps = evals.values, evals.steps
    for first in range(len(values) - FEWEST_EVALUATIONS + 1):
        if steps[-1] - steps[first] < FLAT_STEPS * steps[-1]:
            return None
        later = values[first:]
        level = float(np.median(later))
        if np.abs(later - level).max() <= share_of(level, FLAT_SHARE):
            text = f"eval nll stays near {nats(level)} from step {int(steps[first]):,} on"
            return Finding("plateau", text, {"level": level, "since": int(steps[first])})
    return None


def ending(evals: Evaluations) -> Finding | None:
    """How the run ended: early (and whether too early), not at all, or before eval nll was at its end."""
    run, fall = evals.run, still_falling(evals)
    planned = run.planned_steps
    of = f" of {planned:,}" if planned and planned > run.steps else ""
    numbers: dict[str, float] = {"step": run.steps, **({"planned": planned} if planned else {})}
    falling = f"eval nll was still falling ({nats(fall)} over the last third of its steps)"
    if run.status == "stopped_early":
        warmup = run.number("optim.warmup_steps") or 0
        warm = run.steps <= warmup
        very = "very early" if warm or (planned and run.steps <= VERY_EARLY * planned) else "early"
        told = f"stops {very}, at step {run.steps:,}{of}"
        numbers |= {"fall": fall, "inside_warmup": float(warm), "too_early": float(bool(fall) or warm)}
        if warm:
            told += f", inside the warmup of {int(warmup):,} steps: too early"
        if fall:
            told += f"{'' if warm else ', too early'}: {falling}"
        return Finding("early_stop", told, numbers)
    if run.status in ("running", "preempted", "failed"):
        words = {"running": "still running or killed", "preempted": "interrupted", "failed": "failed"}
        reason = str(run.record.get("reason") or "")
        told = f"unfinished: {words[run.status]} at step {run.steps:,}{of}" + (
            f" ({reason})" if reason else ""
        )
        return Finding("unfinished", told, numbers)
    if not run.status and planned and run.steps < planned:
        return Finding("unfinished", f"unfinished: its curves end at step {run.steps:,}{of}", numbers)
    if fall:
        told = f"undertrained: {falling.replace('was', 'is').replace('its steps', 'the run')}"
        return Finding("undertrained", told, {"fall": fall, **numbers})
    return None


def too_few(evals: Evaluations) -> Finding | None:
    """Says so where there are too few evaluations for any of these."""
    if evals.enough:
        return None
    count = len(evals)
    told = f"only {count} evaluation{'s' * (count != 1)}" if count else "no evaluation"
    return Finding("data", f"{told}: how eval nll goes cannot be told", {"evaluations": count})

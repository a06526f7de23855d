"""What the curve of training says: where it ended, spikes, divergence, the risk of it, and how fast it converged.

Each rule is one function with its formula; the numbers at which it speaks are in thresholds.py.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxlora.experiments import shapes
from jaxlora.experiments.changes import listed
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.findings import Finding, nats, times
from jaxlora.experiments.thresholds import (
    AGREEING,
    APART,
    DIVERGED_NATS,
    DIVERGED_SHARE,
    FEWEST_APART,
    FEWEST_POINTS,
    FLAT_SHARE,
    FLAT_STEPS,
    LEVELS,
    MUCH_SLOWER,
    NEARER,
    RISING_NORM,
    RISING_RANK,
    SAME_CURVE,
    SLIGHTLY,
    SLOWER,
    SMALL_SPIKES,
    SPIKE,
    STEADY,
    WINDOW,
)


def spikes(curve: Curve) -> Finding | None:
    """A loss spike: a logged train nll that is more than `SPIKE` robust deviations above the recent median.

        deviations = (x - median) / (max(1.4826 MAD, LOSS_FLOOR max(median, 1)) (1 + CAUTION / n)),  n <= WINDOW before

    which is the guard's rule on logged steps, with what the guard itself saw between them.
    """
    found = curve.spikes
    if not found:
        return None
    worst = max(found, key=lambda spike: spike.deviations)
    size = f"{worst.deviations:.3g} deviations above the recent median {nats(worst.median)}"
    value = f"train nll {nats(worst.value)}, {size}" if worst.value is not None else size
    returned = f"back by step {worst.back:,}" if worst.back is not None else "not back since"
    text = f"loss spike at step {worst.step:,} ({value}; {returned})"
    if len(found) > 1:
        others = [spike.step for spike in found if spike is not worst]
        shown = listed(f"{step:,}" for step in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        largest = f"the largest at step {worst.step:,} ({value}; {returned})"
        text = f"{len(found)} loss spikes, {largest}, others at {shown}{more}"
    numbers = {
        "step": worst.step,
        "deviations": worst.deviations,
        "median": worst.median,
        "count": len(found),
    }
    if worst.value is not None:
        numbers["value"] = worst.value
    return Finding("spike", text, numbers)


def divergence(curve: Curve) -> Finding | None:
    """Divergence: recorded by the run itself; or a loss that is not finite at the end, or ends far above its lowest:

        end - lowest > max(DIVERGED_NATS, DIVERGED_SHARE (first - lowest)),   end > lowest + SPIKE noise

    with end the median of the last tenth (5 to WINDOW points), lowest the least of the recent medians, first the
    median of the first 3. Where eval nll was measured since, and is less than DIVERGED_NATS above its least, it is the
    batches that differ and not the model: nothing is said.
    """
    run = curve.run
    if run.status == "diverged":
        reason = str(run.record.get("reason") or "").split(" (guard.")[0]
        text = f"diverges at step {run.steps:,}" + (f": {reason}" if reason else "")
        return Finding("divergence", text, {"step": run.steps})
    marked, _ = run.train.of("train/diverged")
    if len(marked):
        return Finding("divergence", f"diverges at step {int(marked[0]):,}", {"step": int(marked[0])})
    if len(curve.broken) and (not len(curve) or curve.broken[-1] > curve.steps[-1]):
        first = int(curve.broken[curve.broken > (curve.steps[-1] if len(curve) else 0)][0])
        return Finding(
            "divergence", f"diverges: the loss is not finite from step {first:,} on", {"step": first}
        )
    if len(curve) < FEWEST_POINTS:
        return None
    values = curve.values
    tail = min(WINDOW, max(5, len(values) // 10))
    end, start = float(np.median(values[-tail:])), float(np.median(values[:3]))
    recent = curve.median[min(5, len(values) - 1) :]
    lowest = float(recent.min())
    rise = end - lowest
    if rise <= max(DIVERGED_NATS, DIVERGED_SHARE * (start - lowest), SPIKE * curve.noise):
        return None
    steps, nll = run.eval.of("eval/nll")
    if (
        len(steps)
        and np.isfinite(nll).all()
        and nll[-1] - nll.min() < DIVERGED_NATS
        and steps[-1] >= curve.steps[-tail]
    ):
        return None
    low = np.flatnonzero(curve.median <= lowest + rise / 2)
    since = int(curve.steps[low[-1]]) if len(low) else int(curve.steps[0])
    text = f"diverges from step {since:,} on: train nll {nats(end)} at the end, {nats(lowest)} at its lowest"
    return Finding("divergence", text, {"step": since, "end": end, "lowest": lowest})


def risk(curve: Curve) -> Finding | None:
    """Risk of diverging: a rising gradient norm, or repeated small spikes.

    median(norm, last quarter) > RISING_NORM median(norm, second quarter), and its rank correlation with the step over
    the last three quarters > RISING_RANK;  or  at least SMALL_SPIKES separate rises of loss or gradient norm of more
    than SMALL_SPIKE deviations, after the first WINDOW logged steps
    """
    signs, numbers = [], {}
    _, norms = curve.norms
    quarter = len(norms) // 4
    if quarter >= FEWEST_POINTS // 2:
        early, late = float(np.median(norms[quarter : 2 * quarter])), float(np.median(norms[-quarter:]))
        if late > RISING_NORM * early > 0 and shapes.rank_correlation(norms[quarter:]) > RISING_RANK:
            signs.append(f"the gradient norm rises from {early:.3g} to {late:.3g} ({times(late / early)})")
            numbers |= {"early_norm": early, "late_norm": late}
    small = curve.small_spikes()
    if len(small) >= SMALL_SPIKES:
        shown = ", ".join(f"{step:,}" for step in small[:3])
        signs.append(f"{len(small)} small spikes (steps {shown}{', ...' if len(small) > 3 else ''})")
        numbers["small_spikes"] = len(small)
    return Finding("risk", f"risks diverging: {listed(signs)}", numbers) if signs else None


def convergence(new: Curve, old: Curve) -> Finding | None:
    """Steps to reach the baseline's loss levels, as a multiple of the baseline's.

        level_k = first - LEVELS_k (first - last) of the baseline's falling curve;  t(level) its first step at or below
        factor  = median over k of t_new(level_k) / t_old(level_k)

    on the nearest curves that never rise. A level that the new run did not reach, though it took SLOWER times as many
    steps, counts as infinite. It is slightly faster or slower where the factor is beyond SLIGHTLY and AGREEING of the
    levels say likewise, plainly so from SLOWER on, and much from MUCH_SLOWER on. All of that only where the curves
    differ by more than their noise, up to the last level:

        |mean(new - old)| > APART noise(new - old) / sqrt(points),   over FEWEST_APART points at least
    """
    if len(new) < FEWEST_POINTS or len(old) < FEWEST_POINTS or new.name != old.name:
        return None
    first, last = float(old.fall[0]), float(old.fall[-1])
    if first - last <= STEADY * old.noise:
        return None
    ratios, shown = [], []
    for share in LEVELS:
        level = first - share * (first - last)
        before, after = _reached(old, level), _reached(new, level)
        if before is None or before <= old.steps[0] or (after is None and new.steps[-1] < SLOWER * before):
            continue
        ratios.append(math.inf if after is None else after / before)
        shown.append((level, before, after))
    if not ratios:
        return None
    factor = float(np.median(ratios))
    level, before, after = shown[len(shown) // 2]
    numbers = {"factor": factor, "level": level, "baseline_step": before}
    differs = _apart(new, old, shown[-1][1])
    if math.isinf(factor):
        at_least = float(new.steps[-1] / before)
        much = "much " if at_least > MUCH_SLOWER else ""
        where = f"train nll {nats(level)} is not reached in {int(new.steps[-1]):,} steps (baseline: {before:,.0f})"
        numbers = {"at_least": at_least, "level": level, "baseline_step": before}
        return Finding("convergence", f"converges {much}slower: {where}", numbers) if differs > 0 else None
    where = f"train nll {nats(level)} at step {after:,.0f} instead of {before:,.0f}" if after else ""
    slower, faster = (np.mean([r > 1 for r in ratios]), np.mean([r < 1 for r in ratios]))
    degree = max(factor, 1 / factor)
    much = "much " if degree > MUCH_SLOWER else "slightly " if degree < SLOWER else ""
    if factor > SLIGHTLY and differs > 0 and slower >= AGREEING:
        text = f"converges {much}slower: {times(factor)} the steps ({where})"
    elif factor < 1 / SLIGHTLY and differs < 0 and faster >= AGREEING:
        text = f"converges {much}faster: in {times(factor)} the steps ({where})"
    else:
        beyond = " within the noise" if not 1 / SLIGHTLY <= factor <= SLIGHTLY else ""
        text = f"converges as fast as the baseline{beyond} ({where})"
    size, old_size = (curve.run.number("train.batch_size") for curve in (new, old))
    if size and old_size and size != old_size:
        numbers["factor_examples"] = factor * size / old_size
        text += f"; {times(factor * size / old_size)} the examples"
    return Finding("convergence", text, numbers)


def stuck(new: Curve, old: Curve) -> Finding | None:
    """Stuck: over the last FLAT_STEPS of the run its falling curve falls by less than FLAT_SHARE of its level, and ends
    more than DIVERGED_NATS above the baseline's at as many steps."""
    if len(new) < FEWEST_POINTS or len(old) < FEWEST_POINTS or new.name != old.name:
        return None
    level, since = float(new.fall[-1]), float(new.steps[-1]) * (1 - FLAT_STEPS)
    fall = float(np.interp(since, new.steps, new.fall)) - level
    reached = float(np.interp(new.steps[-1], old.steps, old.fall))
    if fall >= FLAT_SHARE * max(level, 1.0) or level - reached <= DIVERGED_NATS:
        return None
    text = f"gets stuck: train nll stays near {nats(level)}, the baseline's falls to {nats(reached)}"
    return Finding("stuck", text, {"level": level, "baseline": reached})


def _apart(new: Curve, old: Curve, last: float) -> int:
    """1 where the new curve lies above the old one by more than noise, -1 where below, up to a step; 0 else."""
    within = (new.steps <= last) & (new.steps >= old.steps[0])
    gaps = new.values[within] - np.interp(new.steps[within], old.steps, old.values)
    if len(gaps) < FEWEST_APART:
        return 0
    error = shapes.noise(gaps) / math.sqrt(len(gaps))
    return int(np.sign(gaps.mean())) if abs(gaps.mean()) > APART * error else 0


def _reached(curve: Curve, level: float) -> float | None:
    """The step at which the fall reaches a level, between logged steps by straight lines; None for never."""
    below = np.flatnonzero(curve.fall <= level)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or curve.fall[i - 1] <= curve.fall[i]:
        return float(curve.steps[i])
    share = (curve.fall[i - 1] - level) / (curve.fall[i - 1] - curve.fall[i])
    return float(curve.steps[i - 1] + share * (curve.steps[i] - curve.steps[i - 1]))


def alike(new: Curve, old: Curve | None, earlier: Sequence[Curve], falls: np.ndarray) -> Finding | None:
    """Like another earlier run than its baseline:

        distance(a, b) = mean |fall_a - fall_b| / max(mean fall_a, 1 nat)

    over the steps of `GRID` that both reached, nine tenths of the new run's at least. It is told of the nearest one,
    where that is nearer than SAME_CURVE and the baseline is NEARER times as far.

    Args:
        earlier: runs of the same model that began before; the baseline may be among them.
        falls: [n, G] the falls of each of them on the grid.
    """
    reached = np.isfinite(new.on_grid)
    if not earlier or len(new) < FEWEST_POINTS or not reached.any():
        return None
    own = new.on_grid[reached]
    gaps = np.abs(falls[:, reached] - own)
    both = np.isfinite(gaps)
    count = both.sum(axis=1)
    gaps = np.where(both, gaps, 0.0).sum(axis=1) / np.maximum(count, 1) / max(float(own.mean()), 1.0)
    gaps[count < 0.9 * len(own)] = np.inf
    base = next((gap for curve, gap in zip(earlier, gaps, strict=True) if curve is old), np.inf)
    nearest = int(np.argmin(gaps))
    if earlier[nearest] is old or gaps[nearest] > SAME_CURVE or base < NEARER * gaps[nearest]:
        return None
    text = f"train curve like that of {earlier[nearest].run.name}"
    return Finding("alike", text, {"distance": float(gaps[nearest])})

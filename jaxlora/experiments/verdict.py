"""The verdict on a run: what its rules say, the weightiest first."""

import numpy as np

from jaxlora.experiments import eval_rules, training_rules
from jaxlora.experiments.baseline import model_of
from jaxlora.experiments.curve import GRID, Curve
from jaxlora.experiments.eval_rules import Evaluations
from jaxlora.experiments.findings import Finding, nats
from jaxlora.experiments.records import Run
from jaxlora.experiments.thresholds import FEWEST_POINTS, STEADY


class Reading:
    """A run with its curves looked at; made once, used for its own verdict and for those of the runs after it."""

    def __init__(self, run: Run):
        self.run = run
        self.curve = Curve(run)
        self.evals = Evaluations(run)


class Earlier:
    """The runs of one model so far, their curves laid out for `training_rules.alike`.

    Attributes:
        curves: [n] of them.
    """

    def __init__(self, most: int):
        self.curves: list[Curve] = []
        self._falls = np.empty((most, len(GRID)))

    @property
    def falls(self) -> np.ndarray:
        """[n, G] their falls on the grid."""
        return self._falls[: len(self.curves)]

    def add(self, curve: Curve) -> None:
        """One more; `most` at most."""
        self._falls[len(self.curves)] = curve.on_grid
        self.curves.append(curve)


def verdict(new: Reading, old: Reading | None, earlier: "Earlier | None" = None) -> tuple[Finding, ...]:
    """What came of a run.

    Args:
        new: the run. old: its baseline, None for none. earlier: runs of the same model that began before.
    Returns:
        The findings: what went wrong, how it compares, how it went, where it ended, what cannot be told.
    """
    diverged = training_rules.divergence(new.curve)
    risk = None if diverged else training_rules.risk(new.curve)
    same_model = old is not None and model_of(new.run) == model_of(old.run)
    stuck = training_rules.stuck(new.curve, old.curve) if old and same_model and not diverged else None
    found = [
        diverged,
        training_rules.spikes(new.curve),
        stuck,
        risk,
        None if diverged or risk or stuck else _steady(new),
        *(_against(new, old, earlier, bool(diverged)) if old else ()),
        *(() if diverged else _course(new)),
        _level(new),
        eval_rules.too_few(new.evals),
        _no_curve(new.curve),
    ]
    return tuple(finding for finding in found if finding)


def _against(new: Reading, old: Reading, earlier: "Earlier | None", diverged: bool) -> list[Finding | None]:
    if model_of(new.run) != model_of(old.run):
        found = eval_rules.compared(new.evals, old.evals)
        if found and found.numbers["paired"]:  # the same tokens, so the same tokenizer
            return [found]
        return [Finding("data", f"not compared with {old.run.name}, which has another model")]
    told: list[Finding | None] = []
    if smoothed_apart(new.run, old.run):
        told.append(
            Finding(
                "data", "losses not compared: they include different label smoothing, and nll was not logged"
            )
        )
        return told
    if not diverged:
        told.append(training_rules.convergence(new.curve, old.curve))
        if earlier:
            told.append(training_rules.alike(new.curve, old.curve, earlier.curves, earlier.falls))
    return [*told, eval_rules.compared(new.evals, old.evals)]


def smoothed_apart(new: Run, old: Run) -> bool:
    """Whether all that can be compared is a loss which holds label smoothing, a different one in each."""
    nll = all("train/nll" in run.train.values or "eval/nll" in run.eval.values for run in (new, old))
    smoothing = [run.config.get("optim.label_smoothing", 0) for run in (new, old)]
    return not nll and smoothing[0] != smoothing[1]


def _steady(new: Reading) -> Finding | None:
    """Trains steadily: the loss falls by more than its noise, without spikes."""
    curve = new.curve
    if len(curve) < FEWEST_POINTS or curve.spikes or curve.fall[0] - curve.fall[-1] <= STEADY * curve.noise:
        return None
    return Finding("steady", "trains steadily")


def _course(new: Reading) -> list[Finding | None]:
    overfits = eval_rules.overfitting(new.evals, new.curve)
    flat = None if overfits else eval_rules.plateau(new.evals)
    return [overfits, flat, eval_rules.ending(new.evals)]


def _level(new: Reading) -> Finding | None:
    """Where train nll (median of the last tenth, 3 points at least) and eval nll (the best) ended."""
    parts, numbers = [], {}
    curve, evals = new.curve, new.evals
    if len(curve):
        end = float(np.median(curve.values[-max(3, len(curve) // 10) :]))
        parts.append(f"{curve.name.replace('/', ' ')} {nats(end)}")
        numbers["train"] = end
    if len(evals):
        parts.append(
            f"{evals.name.replace('/', ' ')} {nats(evals.best)} at its best (step {evals.best_step:,})"
        )
        numbers |= {"eval": evals.best, "best_step": evals.best_step}
    return Finding("level", ", ".join(parts), numbers) if parts else None


def _no_curve(curve: Curve) -> Finding | None:
    if len(curve) >= FEWEST_POINTS:
        return None
    told = f"only {len(curve)} logged train losses" if len(curve) else "no train loss was logged"
    return Finding("data", f"{told}: how training went cannot be told", {"points": len(curve)})

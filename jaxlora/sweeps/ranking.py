"""What came of a sweep, from its folders alone: the ranking, and what to try next."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.core.errors import InputError
from jaxlora.experiments.paired import Difference, difference
from jaxlora.runs.directory import RunDirectory
from jaxlora.sweeps.halving import TIED, mean
from jaxlora.sweeps.ledger import judged
from jaxlora.sweeps.trials import Trial, shown

NLL = "eval/nll"


@dataclasses.dataclass(frozen=True)
class Place:
    """A trial in the ranking.

    Attributes:
        trial: the trial.
        record: of its folder; {} where it has none yet.
        best: its best evaluation, by its own calendar or at the rung where it was dropped, {"step", "eval/nll"};
            None for none.
        rows: the per-example columns of that; None for none. before: those of the evaluation before.
        behind: its best evaluation less the winner's, example by example; None for the winner, and where the two
            have no examples in common.
    """

    trial: Trial
    record: Mapping[str, Any]
    best: Mapping[str, Any] | None
    rows: Mapping[str, Sequence[Any]] | None
    before: Mapping[str, Sequence[Any]] | None = None
    behind: Difference | None = None

    @property
    def nll(self) -> float:
        """eval/nll at its best evaluation; infinity where none was finite."""
        value = (self.best or {}).get(NLL)
        return math.inf if value is None else value

    @property
    def step(self) -> int:
        """The step of its best evaluation; 0 without one."""
        return int((self.best or {}).get("step", 0))

    @property
    def tied(self) -> bool:
        """Whether it cannot be told from the winner."""
        return self.behind is not None and abs(self.behind.z) < TIED


def ranking(folder: Path, trials: Sequence[Trial]) -> list[Place]:
    """The trials by their best eval/nll, the winner first; what has none comes last, in the trials' order.

    Args:
        folder: the sweep's, with a folder a trial.
        trials: all of them.
    """
    places = sorted((_place(folder, trial) for trial in trials), key=lambda place: place.nll)
    if not places or not math.isfinite(places[0].nll):
        return places
    winner, *others = places
    return [winner, *(dataclasses.replace(p, behind=_behind(winner, p)) for p in others)]


def _place(folder: Path, trial: Trial) -> Place:
    try:
        run = RunDirectory.read(folder / trial.name)
    except InputError:
        return Place(trial, {}, None, None)
    best = run.record.get("best")
    rows = _rows(run, best["step"] if best else None)
    if rung := judged(folder, trial.name):
        step, columns = rung
        if mean(columns) < (best or {}).get(NLL, math.inf):
            best, rows = {"step": step, NLL: mean(columns)}, columns
    steps = [line["step"] for line in run.metrics() if NLL in line]
    earlier = [step for step in steps if best and step < best["step"]]
    return Place(trial, run.record, best, rows, _rows(run, max(earlier, default=None)))


def _rows(run: RunDirectory, step: int | None) -> Mapping[str, Sequence[Any]] | None:
    """The per-example columns of an evaluation; None where it is gone."""
    try:
        return None if step is None else run.read_evaluation(step)
    except (OSError, ValueError):
        return None


def _behind(winner: Place, other: Place) -> Difference | None:
    """None where the two were not evaluated on the same tokens: an example's number then means another one."""
    if winner.rows is None or other.rows is None:
        return None
    fingerprints = [
        (place.record.get("data") or {}).get("eval", {}).get("fingerprint") for place in (winner, other)
    ]
    if fingerprints[0] != fingerprints[1]:
        return None
    tokens = dict(zip(winner.rows["example"], winner.rows["tokens"], strict=True))
    if any(
        tokens.get(example, count) != count
        for example, count in zip(other.rows["example"], other.rows["tokens"], strict=True)
    ):
        return None
    return difference(winner.rows, other.rows)


# ---- what to try next ----------------------------------------------------------------------------------------------


def advice(places: Sequence[Place]) -> list[str]:
    """What the ranking says about the next sweep, a sentence each."""
    if not places or not math.isfinite(places[0].nll):
        return ["no trial has a finite eval nll: lower the learning rate, or look at the data with plan"]
    return [*_edges(places), *_ties(places), *_length(places[0])]


def _edges(places: Sequence[Place]) -> list[str]:
    """For each key whose values are numbers: whether the best of them lies at an end of what was tried."""
    said = []
    for key in dict.fromkeys(key for place in places for key in place.trial.changes):
        by_value: dict[float, float] = {}
        for place in places:
            value = place.trial.changes.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                by_value[value] = min(by_value.get(value, math.inf), place.nll)
        best = places[0].trial.changes.get(key)
        values = sorted(by_value)
        if len(values) < 3 or best not in by_value:
            continue
        if best in (values[0], values[-1]):
            end, beyond = ("lowest", _beyond(values[1], values[0])) if best == values[0] else (
                "highest", _beyond(values[-2], values[-1])
            )  # fmt: skip
            said.append(
                f"{key}: the best, {shown(best)}, is the {end} that was tried: widen it"
                + (f", for example with {shown(beyond)}" if beyond is not None else "")
            )
        else:
            at = values.index(best)
            said.append(
                f"{key}: the best, {shown(best)}, lies inside what was tried; between {shown(values[at - 1])} and "
                f"{shown(values[at + 1])} there may be a better one"
            )
    return said


def _beyond(inner: float, end: float) -> float | None:
    """The next value in the same direction, by the same ratio; None where there is no sensible one."""
    if inner <= 0 or end <= 0:
        return None
    value = end * end / inner
    if isinstance(end, int):
        return max(1, round(value)) if round(value) != end else None
    return float(f"{value:.2g}")


def _ties(places: Sequence[Place]) -> list[str]:
    tied = [place for place in places if place.tied]
    if not tied:
        return []
    names = ", ".join(place.trial.name for place in tied[:3]) + (
        f" and {len(tied) - 3} more" if tied[3:] else ""
    )
    nearest = tied[0].behind
    more = ""
    if nearest and nearest.mean:
        needed = math.ceil(nearest.examples * (TIED / nearest.z) ** 2)
        more = f" (some {float(f'{needed:.1g}'):,.0f} held-out examples would tell the first)"
    return [f"not to be told from the best: {names}{more}; take the cheaper one"]


def _length(winner: Place) -> list[str]:
    steps = winner.record.get("steps", 0)
    gain = difference(winner.before, winner.rows)
    if winner.record.get("status") == "finished" and winner.step == steps and gain and gain.z < -TIED:
        return [f"the best was still getting better at its last step, {steps:,}: train it for longer"]
    if winner.step and winner.step <= steps / 2:
        return [f"the best was at its best at step {winner.step:,} of {steps:,}: a shorter run will do"]
    return []

"""Evaluations: the best of them, when there have been enough, and when they say that the run overfits."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.experiments.paired import Difference, difference
from jaxlora.training.calendar import Calendar
from jaxlora.training.evaluate import Found
from jaxlora.training.events import Standing, StepInfo, Stop
from jaxlora.training.metrics import ANSWER_METRICS
from jaxlora.training.state import TrainState

NLL = "eval/nll"

Recall = Callable[[int, str], Mapping[str, Any] | None]
"""(step, name) -> the columns of an earlier evaluation's file of that name; None when it is gone."""


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A metric by which evaluations are told apart.

    Attributes:
        name: as it is logged, such as "eval/nll".
        better: (new, old) -> whether the new value is the better one.
    """

    name: str
    better: Callable[[float, float], bool]


@dataclasses.dataclass
class Evaluate:
    """Evaluates when the calendar says so, and keeps the adapter at the very evaluation that is the best.

    Attributes:
        best_by: what the best is best by. keep: how many of the best the standing lists.
        tracked: the metrics that the standing keeps of the latest evaluation.
        generate_every: evaluations from one that answers prompts to the next (the first and the last do too).
        run: evaluates a state; the switch says whether prompts are answered.
        keep_best: writes a state's adapter to best/.
        write: takes (step, metrics); write_examples: takes (step, columns, name); say: takes a line.
        recall: what an earlier evaluation wrote.
        alarm: looks at each evaluation, and adds to its metrics.
        write_texts: takes (step, texts for TensorBoard).
    """

    standing: Standing
    calendar: Calendar
    best_by: Ranked
    keep: int
    tracked: tuple[str, ...]
    generate_every: int
    run: Callable[[TrainState, bool], Found]
    keep_best: Callable[[TrainState], None]
    write: Callable[[int, Mapping[str, Any]], None]
    write_examples: Callable[[int, Mapping[str, list[Any]], str], Any]
    say: Callable[[str], None]
    recall: Recall
    alarm: "OverfitAlarm"
    write_texts: Callable[[int, Mapping[str, str]], Any] = lambda step, texts: None

    def due(self, info: StepInfo) -> bool:
        return self.calendar.due(info.step, self.standing)

    def __call__(self, info: StepInfo) -> None:
        if not self.due(info) or info.state is None:
            return
        standing, step = self.standing, info.step
        answer = standing.evaluations % self.generate_every == 0 or step == info.total_steps
        found = self.run(info.state, answer)
        standing.evaluations += 1
        for name, columns in found.files.items():
            self.write_examples(step, columns, name)
        nll = found.metrics[NLL]
        now = {"step": step, **found.metrics}
        standing.first = standing.first or _named(now, NLL)
        standing.last = _named(now, NLL, *self.tracked)
        better = self._rank(now)
        self.write(step, {**found.metrics, **self.alarm(step, nll)})
        if better:
            self.keep_best(info.state)
        self._plan(step)
        if found.texts:
            self.write_texts(step, found.texts)
        shown, answers = _shown(found.metrics)
        self.say(f"eval at step {step}: {shown}  ({self._compared(now, better)})")
        if answers:
            self.say(f"  answers: {answers}")
        for line in found.shown:
            self.say(line)

    def _rank(self, now: dict[str, Any]) -> bool:
        """Puts the evaluation among the best few where it belongs; whether it is the best."""
        standing, name = self.standing, self.best_by.name
        value = now.get(name)
        if value is None or not math.isfinite(value):
            return False
        better_ones = [b for b in standing.bests if not self.best_by.better(value, b[name])]
        entry = _named(now, NLL, name)
        standing.bests = [*better_ones, entry, *standing.bests[len(better_ones) :]][: self.keep]
        if better_ones:
            return False
        standing.best = entry
        return True

    def _plan(self, step: int) -> None:
        standing, calendar = self.standing, self.calendar
        if calendar.adaptive:
            before = calendar.compared_with(step, standing)
            slope = None
            if before is not None:
                slope = difference(self.recall(before, "eval"), self.recall(step, "eval"))
            standing.next_evaluation = calendar.next(step, slope)
            standing.recent = [s for s in standing.recent if s >= (before or 0)] + [step]

    def _compared(self, now: Mapping[str, Any], better: bool) -> str:
        best, name = self.standing.best, self.best_by.name
        if better:
            return "the best so far"
        if now.get(name) is None and best is not None:
            return f"{name} is not computed here; best {best[name]:.4g} at step {best['step']}"
        return "not finite" if best is None else f"best {best[name]:.4g} at step {best['step']}"


def _named(now: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: now[name] for name in ("step", *names) if now.get(name) is not None}


def _shown(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """The metrics of tokens over all with the gap's other side, and those of answers; groups are in metrics.jsonl."""
    over_all = {
        n.removeprefix("eval/"): v for n, v in metrics.items() if n.startswith("eval/") and v is not None
    }
    answers = {name: over_all.pop(name) for name in ANSWER_METRICS if name in over_all}
    if metrics.get("train_eval/nll") is not None:
        over_all["train_eval/nll"] = metrics["train_eval/nll"]
    line, of_answers = ("  ".join(f"{k} {v:.4g}" for k, v in part.items()) for part in (over_all, answers))
    return line, of_answers


# ---- overfitting ---------------------------------------------------------------------------------------------------

SIGNIFICANT = 3.0
"""Standard errors from which a change counts."""

IN_A_ROW = 2
"""Evaluations in a row that have to agree: the minimum is chosen as the lowest of many, which by itself makes what
comes after it look higher."""


@dataclasses.dataclass
class OverfitAlarm:
    """Says since when eval nll rises while train nll falls.

    At an evaluation after the one with the lowest eval/nll, both changes since then are measured example by example:
    eval/nll has risen when its paired difference is more than `SIGNIFICANT` standard errors above zero, and
    train_eval/nll has fallen when its is as far below. `IN_A_ROW` evaluations that say both raise the alarm; a new
    minimum ends it.

    Attributes:
        recall: what an evaluation wrote, this one included.
        say: takes a line; note: takes (step, texts) for TensorBoard.
    """

    standing: Standing
    recall: Recall
    say: Callable[[str], None]
    note: Callable[[int, Mapping[str, str]], None]

    def __call__(self, step: int, nll: float) -> dict[str, Any]:
        """Looks at the evaluation of a step; returns what is logged with its metrics."""
        standing, lowest = self.standing, self.standing.lowest
        if math.isfinite(nll) and (lowest is None or nll < lowest[NLL]):
            standing.lowest = {"step": step, NLL: nll}
            standing.suspected = 0
            if standing.overfit is not None:
                self.say(f"overfitting: over, with a new lowest eval nll at step {step}")
                standing.overfit = None
            lowest = None
        train_now = self.recall(step, "train_eval")
        if train_now is None:
            return {}
        if lowest is not None:
            since = int(lowest["step"])
            rise = difference(self.recall(since, "eval"), self.recall(step, "eval"))
            fall = difference(self.recall(since, "train_eval"), train_now)
            suspicious = rise is not None and fall is not None and overfits(rise, fall)
            standing.suspected = standing.suspected + 1 if suspicious else 0
            if rise is not None and fall is not None and standing.suspected >= IN_A_ROW:
                self._raise(step, since, rise, fall)
        return {"train_eval/overfit": int(standing.overfit is not None)}

    def _raise(self, step: int, since: int, rise: Difference, fall: Difference) -> None:
        standing, known = self.standing, self.standing.overfit
        standing.overfit = {
            "since": since,
            "found": known["found"] if known else step,
            "eval_rise": rise.mean,
            "eval_rise_standard_error": rise.standard_error,
            "train_fall": -fall.mean,
        }
        text = (
            f"overfitting since step {since}: at step {step} eval nll is {rise.mean:.4f} above its lowest "
            f"(± {rise.standard_error:.4f}, {rise.examples} examples) while train nll fell by {-fall.mean:.4f}"
        )
        self.note(step, {"overfitting": text})
        if not known:
            self.say(
                f"{text}. best/ has the adapter of the best evaluation; training longer makes it no better."
            )


def overfits(rise: Difference, fall: Difference) -> bool:
    """Whether eval nll rose and train nll fell, both beyond chance."""
    return rise.z > SIGNIFICANT and fall.z < -SIGNIFICANT


# ---- stopping ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class EarlyStop:
    """Stops when `patience` evaluations in a row brought no improvement.

    The reference is the value at the last counted improvement, not the last best: small gains add up until they reach
    `min_delta`. Nothing is counted before `min_steps`. Where evaluations come closer together than the calendar's
    longest stretch, each counts as the part of it that it took: patience means as many steps as without.

    Attributes:
        by: what has to improve.
        patience: in evaluations; None never stops.
        min_delta: the least that counts as an improvement.
        in_errors: whether min_delta is in standard errors of the paired difference from the reference (then by is
            eval/nll), and not in the metric's own unit.
        min_steps: no stop before.
        stretch: the longest stretch between evaluations, in steps, where it varies; None where it does not.
        recall: what an evaluation wrote. say: takes a line.
    """

    standing: Standing
    by: Ranked
    patience: int | None
    min_delta: float
    in_errors: bool
    min_steps: int
    stretch: float | None
    recall: Recall
    say: Callable[[str], None]

    def __call__(self, info: StepInfo) -> Stop | None:
        standing, last = self.standing, self.standing.last
        if self.patience is None or last is None or last["step"] != info.step:
            return None
        if self.by.name not in last:  # no prompts were answered at this evaluation
            return None
        before, standing.judged = standing.judged, info.step
        value, needed = last[self.by.name], self._needed(info.step)
        if self._improved(value, needed):
            standing.reference, standing.reference_step, standing.waited = value, info.step, 0
            self.say(f"early stop: {self._told(self._needed(info.step))}")
            return None
        if info.step < self.min_steps:
            self.say(f"early stop: not before step {self.min_steps:,}; {self._target(needed)}")
            return None
        part = 1.0
        if self.stretch is not None and before is not None:
            part = min(1.0, (info.step - before) / self.stretch)
        standing.waited += part
        told = self._told(needed)
        if standing.waited < self.patience - 1e-9 or info.step >= info.total_steps:
            self.say(f"early stop: {told}")
            return None
        return Stop("stopped_early", f"{told} (stop.patience = {self.patience})")

    def _needed(self, step: int) -> float:
        """The change from the reference that counts, in the metric's own unit."""
        standing = self.standing
        if not self.in_errors or standing.reference_step is None:
            return self.min_delta
        paired = difference(self.recall(standing.reference_step, "eval"), self.recall(step, "eval"))
        return self.min_delta * paired.standard_error if paired else 0.0

    def _improved(self, value: float, needed: float) -> bool:
        """A NaN is better than nothing: it counts as no improvement."""
        reference = self.standing.reference
        if reference is None:
            return math.isfinite(value)
        return self.by.better(value, reference) and abs(value - reference) > needed

    def _told(self, needed: float) -> str:
        waited = f"{self.standing.waited:.4g} of {self.patience} evaluations without improvement"
        return f"{waited}; {self._target(needed)}"

    def _target(self, needed: float) -> str:
        reference = self.standing.reference
        if reference is None:
            return f"{self.by.name} has not been finite yet"
        below = self.by.better(0.0, 1.0)
        target = reference - needed if below else reference + needed
        unit = f" ({self.min_delta:g} standard errors)" if self.in_errors and needed else ""
        return f"{self.by.name} must {'fall below' if below else 'rise above'} {target:.4f}{unit} to count"

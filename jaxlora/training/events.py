"""What happens around the steps, in the order in which it happens: guard, log, evaluate, stop, save.

Every event is called with a frozen `StepInfo`, and may return `Stop` or `Rollback`. None of them sees the loop. What
has to survive a kill (the best so far, the patience spent) is in `Standing`, which goes into every checkpoint.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """One step as the host sees it.

    Attributes:
        step: the step's number, from 1 (0: before the first).
        total_steps: the run's last step.
        sums: the scalars of the step's `StepSums`, as floats; empty at step 0.
        rows_nll: its `rows_nll`, still on the device.
        tokens_per_second: tokens that are not padding over the time since the step before; 0 at first.
        state: the state after the step; only for events that run at milestones, where it is the newest.
        leaving: the run ends after this step, by its own end or on request.
    """

    step: int
    total_steps: int
    sums: Mapping[str, float]
    tokens_per_second: float = 0.0
    state: TrainState | None = None
    leaving: bool = False
    rows_nll: Any = None


@dataclasses.dataclass(frozen=True)
class Stop:
    """The run ends here. `status` is what record.json will say; `reason` is for the person."""

    status: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Rollback:
    """The run goes back to an earlier state, and on from there; `step` is where it was found necessary."""

    step: int
    reason: str


@dataclasses.dataclass
class Standing:
    """What a run knows about itself beyond its arrays; saved with every checkpoint as JSON.

    Attributes:
        best: {"step", "eval/nll", and what best is best by} of the best evaluation so far.
        bests: likewise of the best few, the best first.
        first, last: likewise of the first and the latest evaluation.
        lowest: likewise of the one with the lowest eval/nll.
        evaluations: how many there were.
        next_evaluation: the step from which the next one is due, where that depends on the ones before.
        recent: the steps of the newest evaluations, where that depends on them.
        judged: the step of the newest evaluation that early stopping has looked at.
        reference: the value of stop.by that the next improvement is counted from; None before the first.
        reference_step: the step of that evaluation.
        waited: evaluations since that improvement.
        overfit: the alarm in force: {"since": step of the minimum, "found": step, ...}; None for none.
        suspected: evaluations in a row that look like it.
        skipped: updates that were not applied, because loss or gradient was not finite or a spike.
        spikes: steps that were spikes.
        rollbacks: how often the run went back: {"step", "to", "learning_rate"} of each.
        excluded: steps whose rows are not trained on any more.
        good: the newest step that was saved by the calendar, to roll back to; 0 is the start.
        held: steps whose checkpoints a rollback may need: `good`, the one before it, and the best of that time.
        diverged: the step at which the loss had stayed far above where it began; None before.
        tokens: tokens trained on (with loss) so far.
        seconds: time spent, over all starts of the run.
    """

    best: dict[str, Any] | None = None
    bests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    lowest: dict[str, Any] | None = None
    evaluations: int = 0
    next_evaluation: int = 0
    recent: list[int] = dataclasses.field(default_factory=list)
    judged: int | None = None
    reference: float | None = None
    reference_step: int | None = None
    waited: float = 0
    overfit: dict[str, Any] | None = None
    suspected: int = 0
    skipped: int = 0
    spikes: int = 0
    rollbacks: list[dict[str, float]] = dataclasses.field(default_factory=list)
    excluded: list[int] = dataclasses.field(default_factory=list)
    good: int = 0
    held: list[int] = dataclasses.field(default_factory=list)
    diverged: int | None = None
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`. A NaN stays one: Python's JSON reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Standing":
        return cls(**values)


@dataclasses.dataclass
class Log:
    """Counts every step for the person, and writes and shows every `every`th and both ends.

    train/nll is the step's mean negative log-likelihood per trained token; train/loss is the objective, smoothing
    included: the same number when there is none.
    """

    every: int
    write: Callable[[int, Mapping[str, Any]], None]
    tick: Callable[[int], None]
    show: Callable[..., None]

    def __call__(self, info: StepInfo) -> None:
        self.tick(info.step)
        if info.step % self.every and info.step not in (1, info.total_steps):
            return
        if not info.sums[
            "weight"
        ]:  # its rows are not trained on any more: it has no loss, least of all one of 0
            return
        sums = info.sums
        weight = max(sums["weight"], 1.0)
        loss, nll = sums["objective"] / weight, sums["nll"] / weight
        rate, speed = sums["learning_rate"], info.tokens_per_second
        self.show(info.step, loss=loss, nll=nll, learning_rate=rate, tokens_per_second=speed)
        self.write(
            info.step,
            {
                "train/loss": loss,
                "train/nll": nll,
                "train/token_accuracy": sums["correct"] / weight,
                "train/grad_norm": sums["grad_norm"],
                "train/learning_rate": rate,
                "train/tokens": int(sums["weight"]),
                "train/tokens_per_second": round(speed, 1),
            },
        )


@dataclasses.dataclass
class Save:
    """Saves the state every `every` steps, at every evaluation that is among the best few, and when the run leaves.

    Attributes:
        save: takes (step, state).
    """

    standing: Standing
    every: int
    save: Callable[[int, TrainState], None]

    def __call__(self, info: StepInfo) -> None:
        among_best = any(best["step"] == info.step for best in self.standing.bests)
        calendar = info.step % self.every == 0
        if info.state is not None and (calendar or among_best or info.leaving):
            if calendar:
                self.standing.good = info.step
                steps = [info.step - self.every, *(one["step"] for one in self.standing.bests)]
                self.standing.held = sorted({info.step, *(int(step) for step in steps if step > 0)})
            self.save(info.step, info.state)

"""What happens around the steps, in the order in which it happens: guard, log, evaluate, stop, save.

Every event is called with a frozen `StepInfo`, and may return `Stop`. None of them sees the loop. What has to survive
a kill (the best so far, the patience spent) is in `Standing`, which goes into every checkpoint.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """One step as the host sees it.

    Attributes:
        step: the step's number, from 1 (0: before the first).
        total_steps: the run's last step.
        sums: the step's `StepSums` as floats; empty at step 0.
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


@dataclasses.dataclass(frozen=True)
class Stop:
    """The run ends here. `status` is what record.json will say; `reason` is for the person."""

    status: str
    reason: str


@dataclasses.dataclass
class Standing:
    """What a run knows about itself beyond its arrays; saved with every checkpoint as JSON.

    Attributes:
        best: {"step", "eval/nll"} of the lowest eval/nll so far.
        first, last: likewise of the first and the latest evaluation.
        reference: the eval/nll that the next improvement is counted from.
        waited: evaluations since that improvement.
        skipped: updates that were not applied because loss or gradient was not finite.
        tokens: tokens trained on (with loss) so far.
        seconds: time spent, over all starts of the run.
    """

    best: dict[str, float] | None = None
    first: dict[str, float] | None = None
    last: dict[str, float] | None = None
    reference: float = math.inf
    waited: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: before the first evaluation the reference is None."""
        values = dataclasses.asdict(self)
        return values | {"reference": None if math.isinf(self.reference) else self.reference}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Standing":
        fields: dict[str, Any] = dict(values)
        if fields["reference"] is None:
            fields["reference"] = math.inf
        return cls(**fields)


@dataclasses.dataclass
class Guard:
    """Counts updates that were refused for a non-finite loss or gradient, names their rows, ends the run if told to.

    Attributes:
        policy: "stop" ends the run as diverged at the first; "skip" goes on, up to `max_skipped` of them.
        rows: says which examples were in a step's batch.
        write: takes (step, metrics); say: takes a line for the person.
    """

    standing: Standing
    policy: str
    max_skipped: int
    rows: Callable[[int], str]
    write: Callable[[int, Mapping[str, Any]], None]
    say: Callable[[str], None]

    def __call__(self, info: StepInfo) -> Stop | None:
        if info.sums["applied"]:
            return None
        self.standing.skipped += 1
        where = self.rows(info.step)
        self.write(info.step, {"train/nonfinite": 1, "train/rows": where})
        what = "loss" if not math.isfinite(info.sums["objective"]) else "gradient"
        self.say(f"step {info.step}: the {what} is not finite; the update was not applied. Its rows: {where}")
        if self.policy == "stop":
            return Stop(
                "diverged", f"the {what} of step {info.step} is not finite (guard.on_nonfinite = stop)"
            )
        if self.standing.skipped > self.max_skipped:
            return Stop(
                "diverged",
                f"{self.standing.skipped} updates were not finite (guard.max_skipped = {self.max_skipped})",
            )
        return None


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
class Evaluate:
    """Evaluates every `every` steps and at both ends, and keeps the adapter at the very evaluation that is the best.

    Attributes:
        run: state -> (metrics by name, per-example columns, answers or None).
        keep_best: writes a state's adapter to best/.
        write: takes (step, metrics); write_examples: takes (step, columns, name); say: takes a line.
    """

    standing: Standing
    every: int
    run: Callable[[TrainState], tuple[dict[str, float], dict[str, list[Any]], dict[str, list[Any]] | None]]
    keep_best: Callable[[TrainState], None]
    write: Callable[[int, Mapping[str, Any]], None]
    write_examples: Callable[[int, Mapping[str, list[Any]], str], Any]
    say: Callable[[str], None]

    def due(self, info: StepInfo) -> bool:
        return info.step % self.every == 0 or info.step == info.total_steps

    def __call__(self, info: StepInfo) -> None:
        if not self.due(info) or info.state is None:
            return
        metrics, per_example, answers = self.run(info.state)
        self.write_examples(info.step, per_example, "eval")
        if answers is not None:
            self.write_examples(info.step, answers, "answers")
        self.write(info.step, {f"eval/{name}": value for name, value in metrics.items()})
        standing, nll = self.standing, metrics["nll"]
        now = {"step": info.step, "eval/nll": nll}
        standing.first, standing.last = standing.first or now, now
        best = standing.best
        better = math.isfinite(nll) and (best is None or nll < best["eval/nll"])
        if better:
            best = standing.best = now
            self.keep_best(info.state)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        compared = "not finite"
        if best is not None:
            compared = "the best so far" if better else f"best {best['eval/nll']:.4g} at step {best['step']}"
        self.say(f"eval at step {info.step}: {shown}  ({compared})")


@dataclasses.dataclass
class EarlyStop:
    """Stops when `patience` evaluations in a row brought no improvement.

    The reference is the value at the last counted improvement, not the last best: small gains add up until they reach
    `min_delta`. Nothing is counted before `min_steps`.
    """

    standing: Standing
    patience: int | None
    min_delta: float
    min_steps: int
    due: Callable[[StepInfo], bool]

    def __call__(self, info: StepInfo) -> Stop | None:
        if self.patience is None or not self.due(info) or self.standing.last is None:
            return None
        standing, nll = self.standing, self.standing.last["eval/nll"]
        if nll < standing.reference - self.min_delta:  # a NaN is below nothing: it counts as no improvement
            standing.reference, standing.waited = nll, 0
            return None
        if info.step < self.min_steps:
            return None
        standing.waited += 1
        if standing.waited < self.patience or info.step >= info.total_steps:
            return None
        return Stop(
            "stopped_early",
            f"{standing.waited} evaluations without eval/nll falling by more than {self.min_delta:g} below "
            f"{standing.reference:.4f} (stop.patience = {self.patience})",
        )


@dataclasses.dataclass
class Save:
    """Saves the state every `every` steps, at every new best, and when the run leaves.

    Attributes:
        save: takes (step, state, whether it is the best).
    """

    standing: Standing
    every: int
    save: Callable[[int, TrainState, bool], None]

    def __call__(self, info: StepInfo) -> None:
        best = self.standing.best is not None and self.standing.best["step"] == info.step
        if info.state is not None and (info.step % self.every == 0 or best or info.leaving):
            self.save(info.step, info.state, best)

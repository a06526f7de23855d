"""Evaluations, the best one, and when there have been enough of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.training.evaluate import Found
from jaxlora.training.events import Standing, StepInfo, Stop
from jaxlora.training.state import TrainState


@dataclasses.dataclass
class Evaluate:
    """Evaluates every `every` steps and at both ends, and keeps the adapter at the very evaluation that is the best.

    Attributes:
        run: evaluates a state.
        keep_best: writes a state's adapter to best/.
        write: takes (step, metrics); write_examples: takes (step, columns, name); say: takes a line.
        write_texts: takes (step, texts for TensorBoard).
    """

    standing: Standing
    every: int
    run: Callable[[TrainState], Found]
    keep_best: Callable[[TrainState], None]
    write: Callable[[int, Mapping[str, Any]], None]
    write_examples: Callable[[int, Mapping[str, list[Any]], str], Any]
    say: Callable[[str], None]
    write_texts: Callable[[int, Mapping[str, str]], Any] = lambda step, texts: None

    def due(self, info: StepInfo) -> bool:
        return info.step % self.every == 0 or info.step == info.total_steps

    def __call__(self, info: StepInfo) -> None:
        if not self.due(info) or info.state is None:
            return
        found = self.run(info.state)
        for name, columns in found.files.items():
            self.write_examples(info.step, columns, name)
        self.write(info.step, found.metrics)
        if found.texts:
            self.write_texts(info.step, found.texts)
        for line in found.shown:
            self.say(line)
        standing, nll = self.standing, found.metrics["eval/nll"]
        now = {"step": info.step, "eval/nll": nll}
        standing.first, standing.last = standing.first or now, now
        best = standing.best
        better = math.isfinite(nll) and (best is None or nll < best["eval/nll"])
        if better:
            best = standing.best = now
            self.keep_best(info.state)
        shown = "  ".join(
            f"{name.removeprefix('eval/')} {value:.4g}"
            for name, value in found.metrics.items()
            if name.startswith(("eval/", "train_eval/"))  # groups are in the curves
        )
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

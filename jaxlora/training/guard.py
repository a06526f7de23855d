"""The guard: what is done about a step whose loss or gradient is not like those before it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlora.training.events import Standing, StepInfo, Stop


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

"""When to evaluate: by steps, by fractions of an epoch, or as often as the curve is worth it."""

import dataclasses
import math

from jaxlora.experiments.paired import Difference
from jaxlora.training.events import Standing

FINER = ((8.0, 1), (4.0, 2), (2.0, 4))
"""(slope in standard errors from which, the part of the longest stretch that is waited): steepest first."""


@dataclasses.dataclass(frozen=True)
class Calendar:
    """Evaluations before the first step, after the last, and in between.

    Without `adaptive`: at the multiples of `every`. With it, the stretch to the next evaluation follows the slope of
    eval/nll over the last `every` steps, measured in standard errors of the paired difference: `every` where the curve
    falls (or rises) steeply, a half and a quarter where less so, and `finest` where it is flat within its error, which
    is where the minimum lies.

    Attributes:
        every: steps, 1 or more; a fraction of an epoch need not be a whole number of them.
        total: the run's last step.
        adaptive: whether the stretches follow the slope.
        finest: with `adaptive`, the shortest stretch.
    """

    every: float
    total: int
    adaptive: bool = False
    finest: int = 1

    def __str__(self) -> str:
        if self.adaptive:
            return f"an evaluation every {self.finest:,} to {math.ceil(self.every):,}, by the slope"
        return f"an evaluation every {self.every:,.10g}"

    def due(self, step: int, standing: Standing) -> bool:
        """Whether an evaluation is due at a step that none was made at yet."""
        if step in (0, self.total):
            return True
        if self.adaptive:
            return step >= standing.next_evaluation
        return self._count(step) > self._count(step - 1)

    def compared_with(self, step: int, standing: Standing) -> int | None:
        """The evaluation from which the slope at `step` is measured: the newest at least `every` steps ago, else the
        oldest known; None before the second."""
        earlier = [s for s in standing.recent if s <= step - self.every]
        return earlier[-1] if earlier else standing.recent[0] if standing.recent else None

    def next(self, step: int, slope: Difference | None) -> int:
        """The step of the evaluation after the one at `step`.

        Args:
            slope: eval/nll now less that of `compared_with`; None when unknown.
        """
        longest = math.ceil(self.every - 1e-9)
        if slope is None:
            return step + longest
        steepness = abs(slope.z)
        part = next((part for bound, part in FINER if steepness >= bound), None)
        stretch = self.finest if part is None else math.ceil(longest / part)
        return step + min(longest, max(self.finest, stretch))

    def _count(self, step: int) -> int:
        """Evaluations due from step 1 to this one; the margin is for fractions that are whole but for rounding."""
        return math.floor(step / self.every + 1e-9)

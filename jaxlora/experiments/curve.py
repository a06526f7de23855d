"""One run's train curve, looked at once: what sticks out, how it falls."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxlora.experiments import shapes
from jaxlora.experiments.records import Run
from jaxlora.experiments.thresholds import (
    BACK,
    CAUTION,
    LOSS_FLOOR,
    NORM_FLOOR,
    SMALL_SPIKE,
    SPIKE,
    WINDOW,
)

GRID = np.unique(np.rint(10 * 1.25 ** np.arange(60)))
"""Steps at which whole curves are laid beside each other: 10, 12, 16, ..., a quarter further each."""


@dataclass(frozen=True)
class Spike:
    """A rise of the loss above what it was.

    Attributes:
        step: of its highest point. value: the nll there, None where the guard found it between two logged steps.
        median: the recent median. deviations: how far above.
        back: the logged step at which the loss was back (less than `BACK` of the height left); None for never.
    """

    step: int
    value: float | None
    median: float
    deviations: float
    back: int | None


class Curve:
    """A run's train loss.

    Attributes:
        run: whose.
        name: "train/nll", or "train/loss" where that is all there is; "" where there is nothing.
        steps: [S] at which it was logged and finite. values: [S].
        broken: [n] steps at which it was logged and not finite.
    """

    def __init__(self, run: Run):
        self.run = run
        self.name = next((name for name in ("train/nll", "train/loss") if name in run.train.values), "")
        steps, values = run.train.of(self.name)
        finite = np.isfinite(values)
        self.steps, self.values, self.broken = steps[finite], values[finite], steps[~finite]

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def _sticking(self) -> tuple[np.ndarray, np.ndarray]:
        return shapes.deviations(self.values, WINDOW, CAUTION, LOSS_FLOOR, LOSS_FLOOR)

    @property
    def deviations(self) -> np.ndarray:
        """[S] robust deviations above the recent median."""
        return self._sticking[0]

    @property
    def median(self) -> np.ndarray:
        """[S] the recent median."""
        return self._sticking[1]

    @cached_property
    def fall(self) -> np.ndarray:
        """[S] the loss without noise and spikes: the nearest curve that never rises."""
        level = np.where(self.deviations > SMALL_SPIKE, self.median, self.values)
        return shapes.falling(level)

    @cached_property
    def on_grid(self) -> np.ndarray:
        """[G] the fall at the steps of `GRID`, NaN where it was not logged."""
        if not len(self):
            return np.full(len(GRID), np.nan)
        return np.interp(GRID, self.steps, self.fall, left=np.nan, right=np.nan)

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the loss around its course."""
        return shapes.noise(self.values)

    @cached_property
    def spikes(self) -> list[Spike]:
        """The spikes, in order: those that stick out of the logged curve, and those that the guard saw."""
        seen = self._guarded()
        for first, last in groups(np.flatnonzero(self.deviations > SPIKE), WINDOW // 2):
            top = first + int(np.argmax(self.values[first : last + 1]))
            value, median = float(self.values[top]), float(self.median[first])
            step, size = int(self.steps[top]), float(self.deviations[first : last + 1].max())
            within = [s for s in seen if self.steps[first] - self._stride <= s.step <= self.steps[last]]
            if within:  # the guard looks at every step: it knows best where a spike began
                step, size = within[0].step, max(size, *(s.deviations for s in within))
            seen = [s for s in seen if s not in within]
            seen.append(Spike(step, value, median, size, self._back(top, median, value)))
        return sorted(seen, key=lambda spike: spike.step)

    @cached_property
    def _stride(self) -> float:
        return float(np.median(np.diff(self.steps))) if len(self) > 1 else 1.0

    def _guarded(self) -> list[Spike]:
        steps, sizes = self.run.train.of("train/spike")
        kinds = self.run.train.texts.get("train/spike_kind", {})
        medians = dict(zip(*(a.tolist() for a in self.run.train.of("train/spike_median")), strict=True))
        logged = dict(zip(self.steps.tolist(), self.values.tolist(), strict=True))
        found: list[Spike] = []
        for step, size in zip(steps.tolist(), sizes.tolist(), strict=True):
            if kinds.get(step) != "loss" or size <= SPIKE or step not in medians:
                continue
            spike = Spike(step, logged.get(step), medians[step], size, self._next_low(step, medians[step]))
            if found and step - found[-1].step <= WINDOW:
                found[-1] = max(found[-1], spike, key=lambda one: one.deviations)
            else:
                found.append(spike)
        return found

    def _next_low(self, step: int, median: float) -> int | None:
        """The first logged step after a spike at which the loss is at most where it usually was."""
        reach = median + SPIKE * LOSS_FLOOR * max(median, 1.0)
        low = np.flatnonzero((self.steps > step) & (self.values <= reach))
        return int(self.steps[low[0]]) if len(low) else None

    def _back(self, top: int, median: float, value: float) -> int | None:
        after = self.values[top + 1 :] < median + BACK * (value - median)
        # Two in a row: one low batch is not yet a loss that is back.
        twice = after & np.append(after[1:], after[-1:])
        low = np.flatnonzero(twice)
        return int(self.steps[top + 1 + low[0]]) if len(low) else None

    def small_spikes(self) -> list[int]:
        """Steps of separate rises of loss or gradient norm, small ones too, after the first `WINDOW` logged steps."""
        places = [int(self.steps[i]) for i in self._risen(self.deviations)]
        steps, norms = self.norms
        if len(norms):
            high, _ = shapes.deviations(np.log(np.maximum(norms, 1e-30)), WINDOW, CAUTION, NORM_FLOOR)
            places += [int(steps[i]) for i in self._risen(high)]
        places.sort()
        apart: list[int] = []
        for step in places:
            if not apart or step - apart[-1] > self._stride * WINDOW / 2:
                apart.append(step)
        return apart

    @staticmethod
    def _risen(sizes: np.ndarray) -> list[int]:
        return [
            first for first, _ in groups(np.flatnonzero(sizes > SMALL_SPIKE), WINDOW // 2) if first >= WINDOW
        ]

    @cached_property
    def norms(self) -> tuple[np.ndarray, np.ndarray]:
        """([n] steps, [n] finite gradient norms)."""
        steps, norms = self.run.train.of("train/grad_norm")
        finite = np.isfinite(norms)
        return steps[finite], norms[finite]


def groups(places: np.ndarray, apart: int) -> list[tuple[int, int]]:
    """(first, last) of each run of places that are at most `apart` from the one before."""
    if not len(places):
        return []
    cuts = np.flatnonzero(np.diff(places) > apart)
    firsts = places[np.concatenate([[0], cuts + 1])]
    lasts = places[np.concatenate([cuts, [len(places) - 1]])]
    return [(int(a), int(b)) for a, b in zip(firsts, lasts, strict=True)]

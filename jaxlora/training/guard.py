"""The guard: what is done about a step whose loss or gradient is not like those before it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlora.training.events import Rollback, Standing, StepInfo, Stop

SHOWN, QUIET = 5, 50
"""Spikes that are all told on the terminal; then one in as many steps, with how many were not."""

NAMED = 4
"""Examples named in a line; the file of the step has all."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is done; fields as the config's `guard`."""

    on_spike: str
    on_nonfinite: str
    on_divergence: str
    window: int
    max_skipped: int
    max_rollbacks: int


@dataclasses.dataclass
class Guard:
    """Tells of spikes, of steps that are not finite and of a run that diverges, names the rows, and does as it is told.

    What is one was found inside the step (see `spikes.compare`), and so was its update applied or not.

    Attributes:
        rows: (step, [rows] nll of each row of its batch) -> columns "source", "row" and more, the worst rows first.
        write: takes (step, metrics); write_rows: takes (step, columns) and returns the file; say: takes a line.
    """

    standing: Standing
    policy: Policy
    rows: Callable[[int, np.ndarray], Mapping[str, Sequence[Any]]]
    write: Callable[[int, Mapping[str, Any]], None]
    write_rows: Callable[[int, Mapping[str, Sequence[Any]]], Any]
    say: Callable[[str], None]
    _told: int = 0
    _untold: int = 0
    _last: int = 0

    def __call__(self, info: StepInfo) -> Stop | Rollback | None:
        verdict = None
        if not info.sums["finite"]:
            verdict = self._nonfinite(info)
        elif info.sums["spike"]:
            verdict = self._spike(info)
        if verdict is None and info.sums["diverged"]:
            verdict = self._diverged(info)
        if self._untold and (verdict or info.step == info.total_steps):
            self.say(self._not_shown())
        return verdict

    def _nonfinite(self, info: StepInfo) -> Stop | Rollback | None:
        what = "loss" if not math.isfinite(info.sums["objective"]) else "gradient"
        told = f"the {what} is not finite; the update was not applied."
        self._report(info, {"train/nonfinite": 1}, told, always=True)
        return self._decide(info, "on_nonfinite", f"the {what} of step {info.step} is not finite")

    def _spike(self, info: StepInfo) -> Stop | Rollback | None:
        self.standing.spikes += 1
        sums = info.sums
        kinds = {
            "loss": ("nll", sums["nll"] / sums["weight"], sums["loss_deviations"], sums["loss_median"]),
            "gradient norm": (
                "gradient norm",
                sums["grad_norm"],
                sums["norm_deviations"],
                sums["norm_median"],
            ),
        }
        # Both are told where the other is on its way, too; the larger one comes first and names the kind.
        (kind, (name, value, size, median)), (_, (other, at, _, usual)) = sorted(
            kinds.items(), key=lambda item: -item[1][2]
        )
        what = f"{name} {value:.4g} is {size:.3g} deviations above the recent median {median:.4g}"
        applied = "applied" if sums["applied"] else "not applied"
        told = (
            f"a spike: {what} ({other} {at:.4g}, median {usual:.4g}). "
            f"The update was {applied} (guard.on_spike = {self.policy.on_spike})."
        )
        verdict = self._decide(info, "on_spike", f"a spike at step {info.step}: {what}")
        values = {"train/spike": size, "train/spike_kind": kind, "train/spike_median": median}
        self._report(info, values, told, always=verdict is not None)
        return verdict

    def _diverged(self, info: StepInfo) -> Stop | None:
        median, first, window = info.sums["loss_median"], info.sums["first_loss"], self.policy.window
        what = f"the median nll of the last {window} steps is {median:.4g}, the first was {first:.4g}"
        stops = self.policy.on_divergence == "stop"
        if self.standing.diverged is None:
            self.standing.diverged = info.step
            self.write(info.step, {"train/diverged": 1})
            if not stops:
                self.say(f"step {info.step}: the run diverges: {what} (guard.on_divergence = log)")
        return Stop("diverged", f"{what} (guard.on_divergence = stop)") if stops else None

    def _report(self, info: StepInfo, values: dict[str, Any], told: str, always: bool) -> None:
        """The step's file and line of metrics, and what the person reads of it."""
        columns = self.rows(info.step, np.asarray(jax.device_get(info.rows_nll)).reshape(-1))
        file = self.write_rows(info.step, columns)
        places = [f"{name}, row {row}" for name, row in zip(columns["source"], columns["row"], strict=True)]
        names = "; ".join(places[:NAMED])
        names += f"; and {len(places) - NAMED:,} more" if len(places) > NAMED else ""
        self.write(info.step, {**values, "train/rows": names})
        if not always and self._told >= SHOWN and info.step - self._last < QUIET:
            self._untold += 1
            return
        before = f" ({self._not_shown()})" if self._untold else ""
        self.say(f"step {info.step}: {told} Its rows, the worst first: {names}; see {file}{before}")
        self._told, self._untold, self._last = self._told + 1, 0, info.step

    def _not_shown(self) -> str:
        told = f"{self._untold:,} more since step {self._last:,} {'was' if self._untold == 1 else 'were'} not shown"
        self._untold = 0
        return f"{told}; the folder spikes/ has them all"

    def _decide(self, info: StepInfo, key: str, what: str) -> Stop | Rollback | None:
        policy, standing = getattr(self.policy, key), self.standing
        if policy == "rollback":
            if len(standing.rollbacks) < self.policy.max_rollbacks:
                return Rollback(info.step, what)
            count = f"{len(standing.rollbacks)} rollback{'s' * (len(standing.rollbacks) != 1)}"
            return Stop("diverged", f"{what}, after {count} (guard.max_rollbacks)")
        standing.skipped += not info.sums["applied"]
        if policy == "stop":
            return Stop("diverged", f"{what} (guard.{key} = stop)")
        if policy == "skip" and standing.skipped > self.policy.max_skipped:
            told = f"{standing.skipped} updates were skipped (guard.max_skipped = {self.policy.max_skipped})"
            return Stop("diverged", f"{what}; {told}")
        return None

"""The loop: a step, then its events, in one visible order."""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlora.training.events import Log, Rollback, Save, Standing, StepInfo, Stop
from jaxlora.training.guard import Guard
from jaxlora.training.state import TrainState
from jaxlora.training.stopping import EarlyStop, Evaluate


@dataclasses.dataclass(frozen=True)
class Events:
    """The events of a run, in the order in which they happen."""

    guard: Guard
    log: Log
    evaluate: Evaluate
    stop: EarlyStop
    save: Save


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop runs.

    Attributes:
        step: compiled `step(state, base, batch) -> (state, sums)`; the state is donated.
        base: frozen parameters.
        batch: step number -> its batch on the devices.
        total_steps: the last step.
        rollback: carries a rollback out: (verdict, any state of the run) -> the state to go on from.
        asked_to_leave: takes the number of steps made, at every step, rising by one; whether someone asked the run to
            save and end.
        decided: takes the standing and the verdict after each evaluation; where several processes train together, all
            leave with the first one's.
    """

    step: Callable[[TrainState, Any, Mapping[str, Any]], tuple[TrainState, Any]]
    base: Any
    batch: Callable[[int], Mapping[str, Any]]
    total_steps: int
    rollback: Callable[[Rollback, TrainState], TrainState]
    asked_to_leave: Callable[[int], bool] = lambda step: False
    decided: Callable[[Standing, Stop | None], Stop | None] = lambda standing, verdict: verdict


def train(program: Program, state: TrainState, standing: Standing, events: Events) -> tuple[TrainState, Stop]:
    """Trains from the state's step to the end, or until an event stops it.

    The device never waits for Python: while it works on step n, the host puts batch n + 1 beside it and looks at the
    numbers of step n - 1. Only at a milestone (an evaluation, a save, the end) are all steps looked at first.

    Args:
        program: what to run.
        state: where to start; its arrays are donated.
        standing: what the run knows beyond its arrays; the events keep it up to date.
        events: what happens around the steps.
    Returns:
        The last state, and why the loop ended: status "finished", "stopped_early", "diverged" or "preempted".
    """
    total, step = program.total_steps, int(state.step)
    asked, made = False, step  # steps that were gone back from count as made: each number is asked about once
    unseen: collections.deque[tuple[int, Any]] = collections.deque()
    clock: float | None = None  # when the step before was seen; None after anything but a step

    if step == 0:
        _start(program, events, state, standing)
    batch: Any = program.batch(step + 1) if step < total else None
    while step < total:
        # ---- the step, and the next batch while it runs
        step, made = step + 1, made + 1
        clock = clock or time.monotonic()
        state, sums = program.step(state, program.base, batch)
        unseen.append((step, sums))
        batch = program.batch(step + 1) if step < total else None

        # ---- guard and log: every step, one behind unless this one is a milestone
        asked = asked or program.asked_to_leave(made)
        leaving = step == total or asked
        milestone = leaving or events.evaluate.due(StepInfo(step, total, {})) or step % events.save.every == 0
        verdict: Stop | Rollback | None = None
        while len(unseen) > (0 if milestone else 1) and verdict is None:
            number, device_sums = unseen.popleft()
            scalars = jax.device_get(device_sums._replace(rows_nll=0.0))
            host = {name: float(value) for name, value in scalars._asdict().items()}
            now = time.monotonic()
            speed, clock = host["tokens"] / max(now - clock, 1e-9), now
            standing.tokens += int(host["weight"])
            info = StepInfo(number, total, host, speed, rows_nll=device_sums.rows_nll)
            verdict = events.guard(info)
            events.log(info)

        # ---- back to an earlier state; what the device has done since is of no use
        if isinstance(verdict, Rollback):
            unseen.clear()
            state, clock = program.rollback(verdict, state), None
            step = int(state.step)
            if step == 0:
                _start(program, events, state, standing)
            batch = program.batch(step + 1)
            continue

        # ---- evaluate, stop, save
        if milestone or verdict:
            info = StepInfo(step, total, {}, state=state, leaving=leaving)
            if verdict is None:
                events.evaluate(info)
                verdict = program.decided(standing, events.stop(info))
            if verdict is not None:
                info = dataclasses.replace(info, leaving=True)
            events.save(info)
            clock = None
        if verdict is not None:
            return state, verdict
        if leaving and step < total:
            return state, Stop("preempted", f"asked to leave at step {step}")
    return state, Stop("finished", f"all {total} steps done")


def _start(program: Program, events: Events, state: TrainState, standing: Standing) -> None:
    """What happens before the first step."""
    start = StepInfo(0, program.total_steps, {}, state=state)
    events.evaluate(start)
    program.decided(standing, events.stop(start))
    events.save(start)

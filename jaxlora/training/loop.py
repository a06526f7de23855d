"""The loop: a step, then its events, in one visible order, for a run alone or for one of many side by side."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

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


class Made(NamedTuple):
    """A step that the device was given.

    Attributes:
        numbers: waits for the device; the scalars of the step's `StepSums`.
        rows_nll: its `rows_nll`, still on the device.
    """

    numbers: Callable[[], dict[str, float]]
    rows_nll: Any


class Rung(NamedTuple):
    """A run that is compared with others here; it waits to be told a `Stop`, or None to go on."""

    step: int
    number: int


Wish = int | Rollback | Rung
"""What a course asks for: the step of this number (answered by a `Made`), to be taken back (by the step that it goes on
from), or to be compared."""


@dataclasses.dataclass(frozen=True)
class Course:
    """What a run does around its steps; who makes them, and what else is trained meanwhile, it does not know.

    Attributes:
        standing: what the run knows beyond its arrays; the events keep it up to date.
        events: what happens around the steps.
        total_steps: the last step.
        asked_to_leave: takes the number of steps made, at every step, rising by one; whether someone asked the run to
            save and end.
        decided: takes the standing and the verdict after each evaluation; where several processes train together, all
            leave with the first one's.
        rungs: step -> the number of the comparison that is made after it.
    """

    standing: Standing
    events: Events
    total_steps: int
    asked_to_leave: Callable[[int], bool] = lambda step: False
    decided: Callable[[Standing, Stop | None], Stop | None] = lambda standing, verdict: verdict
    rungs: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def __call__(self, step: int, state: Callable[[], TrainState]) -> Generator[Wish, Any, Stop]:
        """Goes from a step to the end, or until an event stops it.

        The device never waits for Python: while it works on step n, the host looks at the numbers of step n - 1. Only
        at a milestone (an evaluation, a save, the end) are all steps looked at first.

        Args:
            step: made already.
            state: the newest state.
        Returns:
            Why it ended: status "finished", "stopped_early", "diverged" or "preempted".
        """
        total, events, standing = self.total_steps, self.events, self.standing
        asked, made = (
            False,
            step,
        )  # steps that were gone back from count as made: each number is asked about once
        dropped: Stop | None = None
        unseen: collections.deque[tuple[int, Made]] = collections.deque()
        clock: float | None = None  # when the step before was seen; None after anything but a step

        if step == 0:
            self._start(state())
        elif step < total and step in self.rungs:
            dropped = yield Rung(step, self.rungs[step])
            if dropped is not None:
                return dropped
        while step < total:
            # ---- the step
            step, made = step + 1, made + 1
            clock = clock or time.monotonic()
            unseen.append((step, (yield step)))
            asked = asked or self.asked_to_leave(made)
            if step < total and step in self.rungs and not asked:
                dropped = yield Rung(step, self.rungs[step])

            # ---- guard and log: every step, one behind unless this one is a milestone
            leaving = step == total or asked or dropped is not None
            milestone = (
                leaving or events.evaluate.due(StepInfo(step, total, {})) or step % events.save.every == 0
            )
            verdict: Stop | Rollback | None = None
            while len(unseen) > (0 if milestone else 1) and verdict is None:
                number, seen = unseen.popleft()
                host, now = seen.numbers(), time.monotonic()
                speed, clock = host["tokens"] / max(now - clock, 1e-9), now
                standing.tokens += int(host["weight"])
                info = StepInfo(number, total, host, speed, rows_nll=seen.rows_nll)
                verdict = events.guard(info)
                events.log(info)

            # ---- back to an earlier state; what the device has done since is of no use
            if isinstance(verdict, Rollback):
                unseen.clear()
                step, clock, dropped = (yield verdict), None, None
                if step == 0:
                    self._start(state())
                continue

            # ---- evaluate, stop, save
            if milestone or verdict:
                info = StepInfo(step, total, {}, state=state(), leaving=leaving)
                if verdict is None:
                    events.evaluate(info)
                    verdict = self.decided(standing, events.stop(info))
                if verdict is not None:
                    info = dataclasses.replace(info, leaving=True)
                events.save(info)
                clock = None
            if verdict is not None:
                return verdict
            if leaving and step < total:
                return dropped or Stop("preempted", f"asked to leave at step {step}")
        return Stop("finished", f"all {total} steps done")

    def _start(self, state: TrainState) -> None:
        """What happens before the first step."""
        start = StepInfo(0, self.total_steps, {}, state=state)
        self.events.evaluate(start)
        self.decided(self.standing, self.events.stop(start))
        self.events.save(start)


def advance(steps: Generator[Wish, Any, Stop], answer: Any = None) -> Wish | Stop:
    """What a course asks for next, when its last wish was answered; or how it ended."""
    try:
        return steps.send(answer)
    except StopIteration as ended:
        return ended.value


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run alone computes with.

    Attributes:
        step: compiled `step(state, base, batch) -> (state, sums)`; the state is donated.
        base: frozen parameters.
        batch: step number -> its batch on the devices.
        rollback: carries a rollback out: (verdict, any state of the run) -> the state to go on from.
        traced: makes a step: (its number, what gives it to the device) -> what the latter returns.
        seen: takes the number of a step whose results the host has.
    """

    step: Callable[[TrainState, Any, Mapping[str, Any]], tuple[TrainState, Any]]
    base: Any
    batch: Callable[[int], Mapping[str, Any]]
    rollback: Callable[[Rollback, TrainState], TrainState]
    traced: Callable[[int, Callable[[], Any]], Any] = lambda step, make: make()
    seen: Callable[[int], None] = lambda step: None


def train(program: Program, course: Course, state: TrainState) -> tuple[TrainState, Stop]:
    """Trains one run, from the state's step to the end of its course.

    While the device works on step n, the host puts batch n + 1 beside it.

    Args:
        program: what to run.
        course: what happens around the steps.
        state: where to start; its arrays are donated.
    Returns:
        The last state, and why the course ended.
    """
    steps = course(int(state.step), lambda: state)
    batch: Any = None  # of the next step, where that is known
    wish = advance(steps)
    while not isinstance(wish, Stop):
        if isinstance(wish, Rollback):
            state, batch = program.rollback(wish, state), None
            wish = advance(steps, int(state.step))
        elif isinstance(wish, Rung):
            wish = advance(steps)  # there is nothing to be compared with
        else:
            now = program.batch(wish) if batch is None else batch
            state, sums = program.traced(wish, functools.partial(program.step, state, program.base, now))
            batch = program.batch(wish + 1) if wish < course.total_steps else None
            wish = advance(steps, Made(functools.partial(_numbers, sums, wish, program.seen), sums.rows_nll))
    return state, wish


def _numbers(sums: Any, step: int, seen: Callable[[int], None]) -> dict[str, float]:
    scalars = jax.device_get(sums._replace(rows_nll=0.0))
    seen(step)
    return {name: float(value) for name, value in scalars._asdict().items()}

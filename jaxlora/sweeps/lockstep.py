"""Trials trained side by side: each goes its own course, and one program makes the steps of all.

Trials go in step: all that are active make the same step of their own run. One that was resumed from a later
checkpoint than others waits until they have reached it, so that each of its steps is made in the company in which it
would have been made without the interruption, by the same program: to the bit the same. Where trials may go back to
earlier steps (guard's rollbacks), each has batches of its own, and one that went back is not waited for.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from jaxlora.sweeps.stack import Ranks, Stack
from jaxlora.training.events import Rollback, Stop
from jaxlora.training.loop import Rung, Wish, advance
from jaxlora.training.state import TrainState


@dataclasses.dataclass(eq=False)
class Lane:
    """A trial on its way.

    Attributes:
        name: the trial's.
        ranks: of its own adapter.
        steps: its course.
        total: its last step.
        gone_back: whether it ever went back to an earlier step.
        rollback: carries a rollback out.
        wish: what its course asks for, or how it ended; None before it began.
    """

    name: str
    ranks: Ranks
    steps: Generator[Wish, Any, Stop]
    total: int
    gone_back: Callable[[], bool]
    rollback: Callable[[Rollback, TrainState], TrainState]
    wish: Wish | Stop | None = None


@dataclasses.dataclass(frozen=True)
class Company:
    """What the trials of a stack have in common.

    Attributes:
        program: slots -> the compiled step of so many (see `stack.side_by_side`).
        base: frozen parameters.
        batches: trial -> the step that it makes, for some trials -> their batches on the devices.
        layout: the step that was made last -> the trials that have a slot from then on.
        compare: (number of a rung, the trials that wait there) -> why those that do not go on stop.
        decided: the number of a rung -> whether it was decided upon, perhaps before an interruption.
        ended: told of each trial that ended.
        asked_to_leave: whether all are to save and end.
    """

    program: Callable[[int], Callable[..., Any]]
    base: Any
    batches: Callable[[Mapping[str, int]], Any]
    layout: Callable[[int], Sequence[str]]
    compare: Callable[[int, Sequence[Lane]], Mapping[str, Stop]]
    decided: Callable[[int], bool]
    ended: Callable[[Lane, Stop], None]
    asked_to_leave: Callable[[], bool]


class Lockstep:
    """Trains the trials of a stack to their ends.

    Args:
        stack: with the states of all.
        company: what they have in common.
    Attributes:
        lanes: the trials, to be filled in before `run`.
        leaving: whether the run is being left; what the courses are told.
    """

    def __init__(self, stack: Stack, company: Company):
        self.lanes: list[Lane] = []
        self.leaving = False
        self._stack, self._company = stack, company
        self._ready: tuple[dict[str, int], Any] = ({}, None)  # the batches of the next step, placed already

    def run(self) -> None:
        """Trains until every trial has ended, or all were asked to leave."""
        made = 0
        for lane in self.lanes:
            self._go_on(lane)
        # Asked once for each step, between the step and what the courses make of it: who is told saves. A request that
        # comes while they do would find trials that have made a step and not saved it.
        self.leaving = self._company.asked_to_leave()
        while alive := [lane for lane in self.lanes if not isinstance(lane.wish, Stop)]:
            if self.leaving:
                self._leave(alive)
                continue

            # ---- trials that are compared with each other, as soon as all are there
            stepping = {lane: lane.wish for lane in alive if isinstance(lane.wish, int)}
            if self._compare(alive, bool(stepping)):
                continue

            # ---- who steps
            bound = [step for lane, step in stepping.items() if not lane.gone_back()]
            made = min(bound) - 1 if bound else made + 1
            active = {
                lane.name: step for lane, step in stepping.items() if lane.gone_back() or step == made + 1
            }
            self._make_room(made)

            # ---- the step, and the next batches while it runs
            known, batch = self._ready
            if not active.items() <= known.items():
                batch = self._company.batches(active)
            program = self._company.program(self._stack.slots)
            seen = self._stack.step(program, self._company.base, batch, list(active))
            next_steps = {
                lane.name: step + 1
                for lane, step in stepping.items()
                if lane.name in active and step < lane.total
            }
            self._ready = (next_steps, self._company.batches(next_steps) if next_steps else None)

            # ---- what each makes of it
            self.leaving = self._company.asked_to_leave()
            for lane in stepping:
                if lane.name in active:
                    self._go_on(lane, seen[lane.name])

    def _go_on(self, lane: Lane, answer: Any = None) -> None:
        """Lets a trial go on until it asks for something that has to be waited for, or has ended."""
        lane.wish = advance(lane.steps, answer)
        while isinstance(lane.wish, Rollback):
            state = lane.rollback(lane.wish, self._stack.take(lane.name, lane.ranks))
            self._stack.put(lane.name, state)
            self._ready = ({}, None)
            lane.wish = advance(lane.steps, int(state.step))
        if isinstance(lane.wish, Stop):
            self._company.ended(lane, lane.wish)

    def _compare(self, alive: Sequence[Lane], more: bool) -> bool:
        """Compares those that wait at a rung, where that was decided before or nobody steps; whether any went on.

        Args:
            more: whether others are still on their way there.
        """
        waiting: dict[int, list[Lane]] = {}
        for lane in alive:
            if isinstance(lane.wish, Rung):
                waiting.setdefault(lane.wish.number, []).append(lane)
        for number, lanes in sorted(waiting.items()):
            if self._company.decided(number) or not more:
                stops = self._company.compare(number, lanes)
                for lane in lanes:
                    self._go_on(lane, stops.get(lane.name))
                return True
        return False

    def _leave(self, alive: Sequence[Lane]) -> None:
        """Ends those that did not make the last step: the others have saved and ended by themselves."""
        for lane in alive:
            if isinstance(lane.wish, Rung):
                self._go_on(lane, Stop("preempted", f"asked to leave at step {lane.wish.step}"))
            elif isinstance(lane.wish, int):  # it waits for others, and was saved where it waits
                step = lane.wish - 1
                lane.steps.close()
                lane.wish = Stop("preempted", f"asked to leave at step {step}")
                self._company.ended(lane, lane.wish)

    def _make_room(self, made: int) -> None:
        """Makes the stack smaller where enough have ended."""
        names = self._company.layout(made)
        if len(names) < len(self._stack.names):
            self._stack.shrink(names)
            self._ready = ({}, None)


def layout(names: Sequence[str], ended: Mapping[str, int], made: int, parts: int = 1) -> tuple[str, ...]:
    """The trials that have a slot after a step.

    A stack is made smaller when half of its trials or more have ended: it is compiled anew each time, twice at most
    for every fourfold. It follows from the steps at which trials ended alone, so that a run that was interrupted makes
    each step in the same company.

    Args:
        names: all trials, in the order of their slots.
        ended: the step at which each that has ended did.
        made: the step.
        parts: that trials are trained in (mesh.trial): slots are a multiple of it.
    """
    now = tuple(names)
    for step in sorted({step for step in ended.values() if step <= made}):
        left = tuple(name for name in now if ended.get(name, step + 1) > step)
        if left and 2 * -(-len(left) // parts) <= -(-len(now) // parts):
            now = left
    return now

"""Who steps, who waits, who is compared and who leaves, on invented courses and without a device."""

import types
from collections.abc import Mapping

from jaxlora.sweeps.lockstep import Company, Lane, Lockstep, layout
from jaxlora.sweeps.stack import Stack
from jaxlora.training.events import Rollback, Stop
from jaxlora.training.loop import Made, Rung


class Steps(Stack):
    """A stack that notes each step: how many slots the program has, and who makes which step with it."""

    def __init__(self, names):
        self.names, self.made = tuple(names), []

    @property
    def slots(self):
        return len(self.names)

    def step(self, program, base, batch, active):
        assert set(batch) >= set(active)
        self.made.append((len(self.names), {name: batch[name] for name in active}))
        return {name: Made(dict, None) for name in active}

    def take(self, name, ranks):
        return name

    def put(self, name, state):
        self.made.append(("put", name, state.step))

    def shrink(self, names):
        self.names = tuple(names)


def course(total, first=0, rungs=(), back=None, ends=None):
    """Goes to its total; to be compared at `rungs`, back to step 1 once it is at `back`, diverged at `ends`."""
    step = first
    if step in rungs and (stop := (yield Rung(step, rungs.index(step) + 1))):
        return stop
    while step < total:
        assert isinstance((yield step + 1), Made)
        step += 1
        if step == back:
            step, back = (yield Rollback(step, "a spike")), None
        if step == ends:
            return Stop("diverged", "as planned")
        if step in rungs and (stop := (yield Rung(step, rungs.index(step) + 1))):
            return stop
    return Stop("finished", "all done")


class Told:
    """A run of lanes: what the stack was asked for, and how each ended."""

    def __init__(self, courses: Mapping, totals: Mapping, decided=(), stops=None, leave_at=None, asked=()):
        self.ended: dict[str, tuple[str, int]] = {}
        self.stack = Steps(courses)
        self.compared: list[tuple[int, list[str], int]] = []
        steps: dict[str, int] = {}

        def batches(wanted):
            steps.update(wanted)
            return dict(wanted)

        def compare(number, lanes):
            self.compared.append((number, [lane.name for lane in lanes], len(self.stack.made)))
            return {name: Stop("preempted", "dropped") for name in (stops or {}).get(number, ())}

        def on_end(lane, stop):
            made = [at[lane.name] for _, at in self.steps() if lane.name in at]
            self.ended[lane.name] = (stop.status, made[-1] if made else 0)

        company = Company(
            lambda slots: lambda: None,
            None,
            batches,
            lambda made: layout(tuple(courses), {n: at for n, (_, at) in self.ended.items()}, made),
            compare,
            lambda number: number in decided,
            on_end,
            lambda: bool(asked) or (leave_at is not None and len(self.stack.made) >= leave_at),
        )
        lockstep = Lockstep(self.stack, company)
        gone: set[str] = set()

        def rollback(name):
            return lambda verdict, state: gone.add(name) or types.SimpleNamespace(step=1)

        for name, steps_of in courses.items():
            lockstep.lanes.append(
                Lane(name, {}, steps_of, totals[name], lambda name=name: name in gone, rollback(name))
            )
        self.lockstep = lockstep
        lockstep.run()

    def steps(self):
        return [made for made in self.stack.made if made[0] != "put"]


def run(totals: Mapping[str, int], plans: Mapping[str, Mapping] | None = None, **named) -> Told:
    plans = plans or {}
    return Told(
        {name: course(total, **plans.get(name, {})) for name, total in totals.items()}, totals, **named
    )


def test_all_make_the_same_step_and_each_ends_at_its_own():
    told = run({"a": 2, "b": 3, "c": 3})
    assert told.steps() == [
        (3, {"a": 1, "b": 1, "c": 1}),
        (3, {"a": 2, "b": 2, "c": 2}),
        (3, {"b": 3, "c": 3}),
    ]
    assert told.ended == {"a": ("finished", 2), "b": ("finished", 3), "c": ("finished", 3)}


def test_one_that_was_saved_later_waits_for_the_others():
    told = run({"a": 4, "b": 4}, plans={"b": {"first": 2}})
    assert told.steps() == [(2, {"a": 1}), (2, {"a": 2}), (2, {"a": 3, "b": 3}), (2, {"a": 4, "b": 4})]


def test_the_stack_is_made_smaller_once_half_has_ended():
    told = run({"a": 2, "b": 5, "c": 5, "d": 4}, plans={"b": {"ends": 3}})
    assert [(slots, sorted(at)) for slots, at in told.steps()] == [
        (4, list("abcd")),
        (4, list("abcd")),
        (4, list("bcd")),
        (2, list("cd")),
        (1, ["c"]),
    ]
    assert told.ended["b"] == ("diverged", 3)


def test_one_that_went_back_is_not_waited_for():
    told = run({"a": 4, "b": 4}, plans={"a": {"back": 3}})
    assert told.stack.made == [
        (2, {"a": 1, "b": 1}),
        (2, {"a": 2, "b": 2}),
        (2, {"a": 3, "b": 3}),
        ("put", "a", 1),
        (2, {"a": 2, "b": 4}),
        (1, {"a": 3}),
        (1, {"a": 4}),
    ]


def test_a_rung_is_decided_when_all_are_there():
    """b's rung comes two steps later than a's and c's: they wait, and then b waits while a catches up."""
    plans = {"a": {"rungs": (1,)}, "b": {"rungs": (3,)}, "c": {"rungs": (1,)}}
    told = run({"a": 4, "b": 4, "c": 4}, plans=plans, stops={1: ["c"]})
    assert told.compared == [(1, ["a", "b", "c"], 3)]
    assert [at for _, at in told.steps()] == [
        {"a": 1, "b": 1, "c": 1}, {"b": 2}, {"b": 3}, {"a": 2}, {"a": 3}, {"a": 4, "b": 4},
    ]  # fmt: skip
    assert told.ended["c"] == ("preempted", 1)


def test_what_was_decided_before_is_not_waited_for():
    told = run({"a": 3, "b": 3}, plans={"a": {"rungs": (1,)}, "b": {"first": 2, "rungs": (1,)}}, decided=(1,))
    assert told.compared == [(1, ["a"], 1)]
    assert told.steps()[-1] == (2, {"a": 3, "b": 3})


def test_all_leave_after_the_same_step():
    """The course of one that steps ends by itself, as it is told; one that waits is ended where it waits."""
    told = run({"a": 9, "b": 9, "c": 9}, plans={"b": {"first": 5}, "c": {"rungs": (1,)}}, leave_at=2)
    assert told.lockstep.leaving
    assert [at for _, at in told.steps()] == [{"a": 1, "c": 1}, {"a": 2}]
    assert {name: status for name, (status, _) in told.ended.items()} == dict.fromkeys("abc", "preempted")


def test_a_request_that_comes_while_trials_save_waits_for_the_next_step():
    """As a signal mostly does: a trial that has made a step leaves by itself, having saved it, or it would be lost."""
    asked, saved, told = [], [], []

    def saving(name, total):
        for step in range(1, total + 1):
            yield step
            if told[0].lockstep.leaving:
                saved.append((name, step))
                return Stop("preempted", "saved")
            if (name, step) == ("a", 2):
                asked.append("SIGTERM")
        return Stop("finished", "all done")

    class Noted(Told):
        def __init__(self, *args, **named):
            told.append(self)
            super().__init__(*args, **named)

    found = Noted({name: saving(name, 9) for name in "ab"}, {"a": 9, "b": 9}, asked=asked)
    assert saved == [("a", 3), ("b", 3)]
    assert found.ended == {"a": ("preempted", 3), "b": ("preempted", 3)}

"""Evaluate, rank, stop, raise the alarm: on invented evaluations."""

import dataclasses
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.training.calendar import Calendar
from jaxlora.training.evaluate import Found
from jaxlora.training.events import Standing, StepInfo, Stop
from jaxlora.training.metrics import better
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, TrainState
from jaxlora.training.stopping import EarlyStop, Evaluate, OverfitAlarm, Ranked

NO_SETTINGS = Settings(OptimizerSettings(*[0.0] * len(OptimizerSettings._fields)), 0.0, 1.0, 0.0)
NLL = Ranked("eval/nll", better("nll"))


def state_at(step):
    """A state that holds nothing but its step."""
    empty = TrainState(*[None] * len(TrainState._fields))  # type: ignore[arg-type]
    return empty._replace(step=jnp.asarray(step))


class Story:
    """A run whose evaluations are invented: what was written, said, noted and kept."""

    def __init__(self, calendar, found, by="nll", keep=1, generate_every=1, mode="auto"):
        self.standing, self.files = Standing(), {}
        self.written, self.said, self.notes, self.kept, self.answered = [], [], [], [], []
        self.total, self.found = calendar.total, found
        ranked = Ranked(by if "/" in by else f"eval/{by}", better(by, mode))
        self.event = Evaluate(
            self.standing, calendar, ranked, keep, (ranked.name, "eval/nll"), generate_every, self.run,
            lambda state: self.kept.append(int(state.step)), lambda *line: self.written.append(line), self.write_file,
            self.said.append, self.recall,
            OverfitAlarm(self.standing, self.recall, self.said.append, lambda *note: self.notes.append(note)),
        )  # fmt: skip

    def run(self, state, answer):
        self.answered.append((int(state.step), answer))
        found = self.found(int(state.step))
        return found if isinstance(found, Found) else Found({"eval/nll": found}, {"eval": {"example": [0]}})

    def write_file(self, step, columns, name):
        self.files[step, name] = columns

    def recall(self, step, name):
        return self.files.get((step, name))

    def go(self):
        for step in range(self.total + 1):
            self.event(StepInfo(step, self.total, {}, state=state_at(step)))
        return self


# ---- the calendar ---------------------------------------------------------------------------------------------------


def due_steps(calendar, standing=None):
    return [step for step in range(calendar.total + 1) if calendar.due(step, standing or Standing())]


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [
        (3, 10, [0, 3, 6, 9, 10]),
        (2.5, 10, [0, 3, 5, 8, 10]),  # a quarter of an epoch of ten steps
        (0.3 * 10, 9, [0, 3, 6, 9]),  # 3.0000000000000004 is three
        (1.0, 3, [0, 1, 2, 3]),
        (400, 10, [0, 10]),
    ],
)
def test_evaluations_come_at_multiples_and_at_both_ends(every, total, expected):
    assert due_steps(Calendar(every, total)) == expected


def columns(values, tokens=10):
    return {"example": list(range(len(values))), "nll": list(values), "tokens": [tokens] * len(values)}


def noisy(mean, seed, count=64, spread=0.05):
    """Per-example nll around a mean: examples differ a lot, and each moves a little by itself."""
    level = np.random.default_rng(0).normal(0, 0.5, count)
    return mean + level + np.random.default_rng(seed).normal(0, spread, count)


def test_evaluations_are_finer_near_the_minimum_and_coarser_away_from_it():
    def found(step):
        values = noisy(2.0 + ((step - 500) / 500) ** 2, step)
        return Found({"eval/nll": float(values.mean())}, {"eval": columns(values)})

    story = Story(Calendar(80, 1000, adaptive=True, finest=10), found).go()
    steps = [step for step, _ in story.written]
    stretches = {a: b - a for a, b in itertools.pairwise(steps)}
    assert stretches[0] == 80
    assert steps[-1] == 1000
    near = [length for step, length in stretches.items() if 440 <= step <= 560]
    far = [length for step, length in stretches.items() if step < 300 or 700 < step < 900]
    assert min(near) == 10
    assert np.mean(near) < 0.4 * np.mean(far)
    coarse = Story(Calendar(80, 1000), found).go()
    assert abs(story.standing.best["step"] - 500) <= abs(coarse.standing.best["step"] - 500)
    assert story.standing.best["eval/nll"] <= coarse.standing.best["eval/nll"]


def test_an_adaptive_calendar_survives_a_kill_at_any_evaluation():
    def found(step):
        values = noisy(2.0 + ((step - 100) / 100) ** 2, step)
        return Found({"eval/nll": float(values.mean())}, {"eval": columns(values)})

    calendar = Calendar(20, 200, adaptive=True, finest=3)
    undisturbed = Story(calendar, found).go()
    broken = Story(calendar, found)
    for step in range(201):
        if step % 7 == 0:
            for field, value in json.loads(json.dumps(broken.standing.to_json())).items():
                setattr(broken.standing, field, value)
        broken.event(StepInfo(step, 200, {}, state=state_at(step)))
    assert [step for step, _ in broken.written] == [step for step, _ in undisturbed.written]
    assert broken.standing == undisturbed.standing


# ---- the best -------------------------------------------------------------------------------------------------------


def test_the_best_is_kept_at_the_evaluation_that_found_it():
    values = {0: 3.0, 10: 2.0, 20: 2.5, 30: 1.5}
    story = Story(Calendar(10, 30), values.__getitem__).go()
    assert story.kept == [0, 10, 30]
    assert story.standing.first == {"step": 0, "eval/nll": 3.0}
    assert story.standing.best == story.standing.last == {"step": 30, "eval/nll": 1.5}
    assert story.written == [(step, {"eval/nll": nll}) for step, nll in values.items()]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    values = {0: math.nan, 10: 2.0, 20: math.nan}
    story = Story(Calendar(10, 20), values.__getitem__, keep=3).go()
    assert story.kept == [10]
    assert story.standing.bests == [{"step": 10, "eval/nll": 2.0}]


def test_the_best_few_are_listed_the_best_first_and_the_earlier_of_equals():
    values = dict(zip(range(0, 70, 10), [3.0, 1.0, 2.0, 1.0, 0.5, 4.0, 1.5], strict=True))
    story = Story(Calendar(10, 60), values.__getitem__, keep=3).go()
    assert [b["step"] for b in story.standing.bests] == [40, 10, 30]
    assert story.kept == [0, 10, 40]


def test_the_best_by_another_metric_and_only_where_it_is_computed():
    matches = {0: 0.1, 20: 0.5, 40: 0.4, 50: 0.5}

    def found(step):
        extra = {"eval/exact_match": matches[step]} if step in matches else {}
        return Found({"eval/nll": 1.0 + step, **extra}, {})

    story = Story(Calendar(10, 50), found, by="exact_match", generate_every=2).go()
    assert story.answered == [(0, True), (10, False), (20, True), (30, False), (40, True), (50, True)]
    assert story.kept == [0, 20]
    assert story.standing.best == {"step": 20, "eval/nll": 21.0, "eval/exact_match": 0.5}
    lowest = Story(Calendar(10, 50), found, by="exact_match", mode="min").go()
    assert lowest.standing.best["step"] == 0


# ---- early stopping -------------------------------------------------------------------------------------------------


def run_early_stop(values, patience, min_delta=0.0, min_steps=0, every=10, by=NLL, stretch=None, files=None):
    """Feeds values at steps 0, every, ... (or at the steps of a dict); returns (step of the stop or None, standing)."""
    standing, said = Standing(), []
    stop = EarlyStop(
        standing, by, patience, min_delta, files is not None, min_steps, stretch,
        lambda step, name: None if files is None else files[step], said.append,
    )  # fmt: skip
    points = values if isinstance(values, dict) else {i * every: value for i, value in enumerate(values)}
    for step, value in points.items():
        standing.last = {"step": step, by.name: value}
        verdict = stop(StepInfo(step, 10**6, {}))
        if verdict is not None:
            assert verdict.status == "stopped_early"
            return step, standing
        assert patience is None or said.pop().startswith("early stop: ")
    return None, standing


def test_early_stop_counts_evaluations_without_improvement():
    assert run_early_stop([3.0, 2.0, 2.1, 2.2, 2.3], patience=3)[0] == 40
    assert run_early_stop([3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.0], patience=3)[0] is None


def test_early_stop_by_a_metric_of_which_more_is_better():
    accuracy = Ranked("eval/exact_match", better("exact_match"))
    assert run_early_stop([0.1, 0.5, 0.4, 0.5, 0.5], patience=3, by=accuracy)[0] == 40
    assert run_early_stop([0.1, 0.2, 0.3, 0.4, 0.5], patience=1, by=accuracy)[0] is None


def test_improvements_below_the_threshold_add_up():
    """A loss that falls steadily by less than min_delta a time never stops: the reference waits for the sum."""
    falling = [2.0 - 0.004 * i for i in range(40)]
    assert run_early_stop(falling, patience=3, min_delta=0.01)[0] is None
    assert run_early_stop([2.0, 1.999, 1.998, 1.997], patience=3, min_delta=0.01)[0] == 30


def test_an_improvement_in_standard_errors_is_one_that_the_examples_agree_on():
    """The same fall of the mean counts when all examples share it, and does not when it is a few examples' luck."""
    level = np.random.default_rng(0).normal(2.0, 0.5, 50)
    agreed = level - 0.01 + np.random.default_rng(1).normal(0, 0.002, 50)
    disputed = level - 0.01 + np.random.default_rng(2).normal(0, 0.2, 50)
    for after, stops in ((agreed, False), (disputed, True)):
        files = {0: columns(level), 10: columns(after)}
        means = [float(level.mean()), float(level.mean()) - 0.01]
        assert (run_early_stop(means, 1, min_delta=2.0, files=files)[0] == 10) is stops


def test_a_first_evaluation_that_is_not_finite_is_no_reference():
    assert run_early_stop([math.nan, 3.0, 2.0, 1.0, 0.9], patience=2)[0] is None
    assert run_early_stop([math.inf, math.nan, 2.0], patience=2)[0] == 10


def test_no_early_stop_before_min_steps():
    rising = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]
    assert run_early_stop(rising, patience=2, min_steps=0)[0] == 20
    assert run_early_stop(rising, patience=2, min_steps=40)[0] == 50


def test_early_stop_is_off_without_patience():
    assert run_early_stop([2.0] * 50, patience=None)[0] is None


def test_finer_evaluations_do_not_use_patience_up_sooner():
    """Ten evaluations a stretch: a patience of 2 still means two stretches of 100 steps."""
    flat = dict.fromkeys(range(0, 1000, 10), 2.0)
    assert run_early_stop(flat, patience=2, stretch=100.0)[0] == 200
    assert run_early_stop(flat, patience=2)[0] == 20


def test_patience_survives_a_resume():
    _, standing = run_early_stop([2.0, 2.1, 2.2], patience=3)
    resumed = Standing.from_json(json.loads(json.dumps(standing.to_json())))
    assert resumed == standing
    resumed.last = {"step": 30, "eval/nll": 2.3}
    stop = EarlyStop(resumed, NLL, 3, 0.0, False, 0, None, lambda *_: None, lambda _: None)
    verdict = stop(StepInfo(30, 1000, {}))
    assert isinstance(verdict, Stop)
    assert "3 of 3 evaluations" in verdict.reason
    assert "fall below 2.0000" in verdict.reason


def test_an_evaluation_without_the_metric_is_not_counted():
    standing = Standing(last={"step": 10, "eval/nll": 1.0})
    by = Ranked("eval/exact_match", better("exact_match"))
    stop = EarlyStop(standing, by, 1, 0.0, False, 0, None, lambda *_: None, lambda _: None)
    before = dataclasses.replace(standing)
    assert stop(StepInfo(10, 1000, {})) is None
    assert standing == before


# ---- overfitting ----------------------------------------------------------------------------------------------------


def tell(eval_mean, train_mean, total=100, every=10):
    """A story in which the mean nll of both follow functions of the step, examples moving by themselves."""

    def found(step):
        held, seen = noisy(eval_mean(step), step), noisy(train_mean(step), 10_000 + step)
        return Found(
            {"eval/nll": float(held.mean()), "train_eval/nll": float(seen.mean())},
            {"eval": columns(held), "train_eval": columns(seen)},
        )

    return Story(Calendar(every, total), found).go()


def test_the_alarm_says_since_when_eval_rises_while_train_falls():
    story = tell(lambda s: 2.0 + 0.01 * abs(s - 40), lambda s: 2.0 - 0.01 * s)
    alarms = [line for line in story.said if line.startswith("overfitting since step 40")]
    assert len(alarms) == 1
    assert story.standing.overfit["since"] == 40
    assert story.standing.overfit["found"] in (60, 70)
    flags = [metrics["train_eval/overfit"] for _, metrics in story.written]
    assert flags == sorted(flags)
    assert (flags[0], flags[-1]) == (0, 1)
    assert story.notes[0][0] == story.standing.overfit["found"]
    assert "since step 40" in story.notes[0][1]["overfitting"]


@pytest.mark.parametrize(
    ("eval_mean", "train_mean"),
    [
        (lambda s: 2.0 - 0.01 * s, lambda s: 2.0 - 0.01 * s),  # both fall
        (
            lambda s: 2.0 + 0.01 * s,
            lambda s: 2.0 + 0.01 * s,
        ),  # both rise: it diverges, which is another matter
        (lambda s: 2.0, lambda s: 2.0 - 0.01 * s),  # eval is flat
    ],
)
def test_no_alarm_without_both(eval_mean, train_mean):
    assert tell(eval_mean, train_mean).standing.overfit is None


def test_a_new_minimum_ends_the_alarm():
    story = tell(lambda s: 2.0 + (0.01 * (s - 20) if 20 < s < 80 else -0.005 * s), lambda s: 2.0 - 0.01 * s)
    assert story.standing.overfit is None
    assert any(line.startswith("overfitting since step 20") for line in story.said)
    assert any(line.startswith("overfitting: over") for line in story.said)


def test_chance_alone_raises_no_alarm():
    """A plateau on which every example wanders by itself, over and over."""
    raised = 0
    for seed in range(40):
        story = tell(lambda s, seed=seed: 2.0 + 1e-9 * seed * s, lambda s: 2.0 - 0.01 * s, total=300)
        raised += any(line.startswith("overfitting since") for line in story.said)
    assert raised == 0

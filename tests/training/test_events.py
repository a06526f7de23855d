"""Guard, log, evaluate, stop, save: each alone, on invented numbers."""

import json
import math

import jax.numpy as jnp

from jaxlora.training.evaluate import Found
from jaxlora.training.events import Log, Save, Standing, StepInfo, Stop
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.spikes import no_steps
from jaxlora.training.state import Settings, TrainState
from jaxlora.training.stopping import EarlyStop, Evaluate

NO_SETTINGS = Settings(OptimizerSettings(*[0.0] * len(OptimizerSettings._fields)), 0.0, 1.0, 0.0)
SUMS = {
    "objective": 30.0, "nll": 20.0, "correct": 5.0, "weight": 10.0, "tokens": 40.0, "grad_norm": 0.5,
    "learning_rate": 1e-3, "applied": 1.0,
}  # fmt: skip


def state_at(step):
    """A state that holds nothing but its step."""
    return TrainState(jnp.asarray(step), {}, {}, None, jnp.zeros(2, jnp.uint32), NO_SETTINGS, no_steps(4))


def at(step, state=None, leaving=False, **changed):
    return StepInfo(step, 1000, {**SUMS, **changed}, tokens_per_second=12.34, state=state, leaving=leaving)


def run_early_stop(values, patience, min_delta=0.0, min_steps=0, every=10):
    """Feeds eval/nll values at steps 0, every, ...; returns (step of the stop or None, standing)."""
    standing = Standing()
    stop = EarlyStop(standing, patience, min_delta, min_steps, due=lambda info: True)
    for index, nll in enumerate(values):
        standing.last = {"step": index * every, "eval/nll": nll}
        verdict = stop(at(index * every))
        if verdict is not None:
            assert verdict.status == "stopped_early"
            return index * every, standing
    return None, standing


def test_early_stop_counts_evaluations_without_improvement():
    assert run_early_stop([3.0, 2.0, 2.1, 2.2, 2.3], patience=3)[0] == 40
    assert run_early_stop([3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.0], patience=3)[0] is None


def test_improvements_below_the_threshold_add_up():
    """A loss that falls steadily by less than min_delta a time never stops: the reference waits for the sum."""
    falling = [2.0 - 0.004 * i for i in range(40)]
    assert run_early_stop(falling, patience=3, min_delta=0.01)[0] is None
    assert run_early_stop([2.0, 1.999, 1.998, 1.997], patience=3, min_delta=0.01)[0] == 30


def test_a_first_evaluation_that_is_not_finite_is_no_reference():
    assert run_early_stop([math.nan, 3.0, 2.0, 1.0, 0.9], patience=2)[0] is None
    assert run_early_stop([math.inf, math.nan, 2.0], patience=2)[0] == 10


def test_no_early_stop_before_min_steps():
    rising = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]
    assert run_early_stop(rising, patience=2, min_steps=0)[0] == 20
    assert run_early_stop(rising, patience=2, min_steps=40)[0] == 50


def test_early_stop_is_off_without_patience():
    assert run_early_stop([2.0] * 50, patience=None)[0] is None


def test_patience_survives_a_resume():
    _, standing = run_early_stop([2.0, 2.1, 2.2], patience=3)
    resumed = Standing.from_json(json.loads(json.dumps(standing.to_json())))
    assert resumed == standing
    resumed.last = {"step": 30, "eval/nll": 2.3}
    assert isinstance(EarlyStop(resumed, 3, 0.0, 0, due=lambda info: True)(at(30)), Stop)


def test_a_new_standing_is_json():
    standing = Standing()
    assert Standing.from_json(json.loads(json.dumps(standing.to_json()))) == standing


def test_log_divides_once_and_keeps_to_its_interval():
    written, shown, ticks = [], [], []
    log = Log(
        10, lambda *x: written.append(x), ticks.append, lambda step, **facts: shown.append((step, facts))
    )
    for step in range(1, 22):
        log(at(step))
    assert ticks == list(range(1, 22))
    assert [step for step, _ in written] == [step for step, _ in shown] == [1, 10, 20]
    assert written[0][1] == {
        "train/loss": 3.0, "train/nll": 2.0, "train/token_accuracy": 0.5, "train/grad_norm": 0.5,
        "train/learning_rate": 1e-3, "train/tokens": 10, "train/tokens_per_second": 12.3,
    }  # fmt: skip


def test_a_step_without_a_trained_token_has_no_loss():
    written = []
    log = Log(1, lambda *x: written.append(x), lambda step: None, lambda *x, **y: written.append(x))
    log(at(1, weight=0.0, objective=0.0, nll=0.0))
    assert written == []


def test_the_best_is_kept_at_the_evaluation_that_found_it():
    values = {0: 3.0, 10: 2.0, 20: 2.5, 30: 1.5}
    kept, written, standing = [], [], Standing()
    evaluate = Evaluate(
        standing,
        10,
        run=lambda state: Found({"eval/nll": values[int(state.step)]}, {"eval": {"example": [0]}}),
        keep_best=lambda state: kept.append(int(state.step)),
        write=lambda *x: written.append(x),
        write_examples=lambda *x: None,
        say=lambda text: None,
    )
    for step in range(31):
        evaluate(at(step, state=state_at(step)))
    assert kept == [0, 10, 30]
    assert (standing.first["step"], standing.best, standing.last["step"]) == (
        0,
        {"step": 30, "eval/nll": 1.5},
        30,
    )
    assert written == [(step, {"eval/nll": nll}) for step, nll in values.items()]


def test_the_last_step_is_evaluated_and_saved_whatever_the_interval():
    standing = Standing(best={"step": 3, "eval/nll": 1.0})
    saved = []
    save = Save(standing, 400, lambda step, state, best: saved.append((step, best)))
    evaluate = Evaluate(standing, 400, lambda state: None, *[lambda *x: None] * 4)
    for step in (1, 3, 400, 401, 1000):
        save(at(step, state=state_at(step), leaving=step in (401, 1000)))
    assert saved == [(3, True), (400, False), (401, False), (1000, False)]
    # What the calendar saved is what can be gone back to, with what was best then; the last save is not of it.
    assert (standing.good, standing.held) == (400, [3, 400])
    assert [evaluate.due(at(step)) for step in (1, 400, 1000)] == [False, True, True]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    kept, standing = [], Standing()
    values = {0: math.nan, 10: 2.0, 20: math.nan}
    evaluate = Evaluate(
        standing,
        10,
        run=lambda state: Found({"eval/nll": values[int(state.step)]}, {"eval": {"example": [0]}}),
        keep_best=lambda state: kept.append(int(state.step)),
        write=lambda *x: None,
        write_examples=lambda *x: None,
        say=lambda text: None,
    )
    for step in values:
        evaluate(at(step, state=state_at(step)))
    assert kept == [10]
    assert standing.best == {"step": 10, "eval/nll": 2.0}

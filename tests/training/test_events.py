"""Log, save: each alone, on invented numbers."""

import json

import jax.numpy as jnp

from jaxlora.training.events import Log, Save, Standing, StepInfo
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.spikes import no_steps
from jaxlora.training.state import Settings, TrainState

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


def test_the_last_step_is_saved_whatever_the_interval():
    standing = Standing(bests=[{"step": 7, "eval/nll": 0.9}, {"step": 3, "eval/nll": 1.0}])
    saved = []
    save = Save(standing, 400, lambda step, state: saved.append(step))
    for step in (1, 3, 5, 7, 400, 401, 1000):
        save(at(step, state=state_at(step), leaving=step in (401, 1000)))
    assert saved == [3, 7, 400, 401, 1000]
    # What the calendar saved is what can be gone back to, with what was best then; the last save is not of it.
    assert (standing.good, standing.held) == (400, [3, 7, 400])

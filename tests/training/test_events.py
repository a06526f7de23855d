"""Guard, log, save: each alone, on invented numbers."""

import json
import math

import jax.numpy as jnp
import pytest

from jaxlora.training.events import Log, Save, Standing, StepInfo
from jaxlora.training.guard import Guard
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, TrainState

NO_SETTINGS = Settings(OptimizerSettings(*[0.0] * len(OptimizerSettings._fields)), 0.0, 1.0, 0.0)
SUMS = {
    "objective": 30.0, "nll": 20.0, "correct": 5.0, "weight": 10.0, "tokens": 40.0, "grad_norm": 0.5,
    "learning_rate": 1e-3, "applied": 1.0,
}  # fmt: skip


def state_at(step):
    """A state that holds nothing but its step."""
    return TrainState(jnp.asarray(step), {}, {}, None, jnp.zeros(2, jnp.uint32), NO_SETTINGS)


def at(step, state=None, leaving=False, **changed):
    return StepInfo(step, 1000, {**SUMS, **changed}, tokens_per_second=12.34, state=state, leaving=leaving)


def test_a_new_standing_is_json():
    standing = Standing()
    assert Standing.from_json(json.loads(json.dumps(standing.to_json()))) == standing


@pytest.mark.parametrize("broken", [{"objective": math.nan}, {"grad_norm": math.inf}])
def test_guard_names_the_rows_and_stops_or_goes_on(broken):
    written, said = [], []
    for policy, limit, expected in (("stop", 9, [True]), ("skip", 2, [False, False, True])):
        standing = Standing()
        guard = Guard(
            standing, policy, limit, lambda step: f"rows of {step}", lambda *x: written.append(x), said.append
        )
        assert guard(at(1)) is None
        for number, stops in enumerate(expected, 2):
            verdict = guard(at(number, applied=0.0, **broken))
            assert (verdict is not None) == stops
            assert verdict is None or verdict.status == "diverged"
        assert standing.skipped == len(expected)
    assert written[0] == (2, {"train/nonfinite": 1, "train/rows": "rows of 2"})
    assert "rows of 2" in said[0]


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


def test_the_last_step_is_saved_whatever_the_interval():
    standing = Standing(bests=[{"step": 7, "eval/nll": 0.9}, {"step": 3, "eval/nll": 1.0}])
    saved = []
    save = Save(standing, 400, lambda step, state: saved.append(step))
    for step in (1, 3, 5, 7, 400, 401, 1000):
        save(at(step, state=state_at(step), leaving=step in (401, 1000)))
    assert saved == [3, 7, 400, 401, 1000]

"""When a run evaluates and could first be stopped: what the plan says is what the run's own calendar and rule do."""

import pytest

from jaxlora.config.build import dataplan
from jaxlora.config.schema import Config
from jaxlora.training.calendar import Calendar
from jaxlora.training.events import StepInfo
from jaxlora.training.metrics import better
from jaxlora.training.stopping import EarlyStop, Ranked, Standing

PER_EPOCH = 30


def run(every: float, steps: int, patience: int, min_steps: int) -> tuple[int, tuple[int, int] | None]:
    """(evaluations, (evaluations, step) at an early stop) of a run in which nothing ever improves."""
    standing, days, number, stopped = Standing(), Calendar(every, steps), 0, None
    stop = EarlyStop(
        standing, Ranked("eval/nll", better("nll", "auto")), patience, 0.0, False, min_steps, None,
        lambda *_: {}, lambda _: None,
    )  # fmt: skip
    for step in range(steps + 1):
        if not days.due(step, standing):
            continue
        number += 1
        standing.last = {"step": step, "eval/nll": 1.0}
        if stop(StepInfo(step, steps, {})) and stopped is None:
            stopped = (number, step)
    return number, stopped


@pytest.mark.parametrize(
    "settings", [{"every": 10}, {"every": 7}, {"every_epochs": 0.25}, {"every_epochs": 0.01}]
)
@pytest.mark.parametrize("min_steps", [0, 1, 10, 14, 35])
@pytest.mark.parametrize("patience", [1, 3, 8])
@pytest.mark.parametrize("steps", [9, 40, 70, 100])
def test_the_plan_is_what_happens(settings, min_steps, patience, steps):
    config = Config.from_dict(
        {
            "model": {"path": "x"},
            "data": {"train": "x"},
            "eval": settings,
            "stop": {"patience": patience, "min_steps": min_steps},
        }
    )
    number, stopped = run(dataplan.eval_every(config, PER_EPOCH), steps, patience, min_steps)
    assert dataplan.evaluations(config, steps, PER_EPOCH) == number
    assert dataplan.earliest_stop(config, steps, PER_EPOCH) == stopped


def test_without_patience_no_run_is_stopped():
    config = Config.from_dict({"model": {"path": "x"}, "data": {"train": "x"}})
    assert dataplan.earliest_stop(config, 1000, PER_EPOCH) is None

"""The guard: what it says, writes and decides of a step, on invented numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.training.events import Rollback, Standing, StepInfo, Stop
from jaxlora.training.guard import QUIET, SHOWN, Guard, Policy

SUMS = {
    "objective": 30.0, "nll": 20.0, "correct": 5.0, "weight": 10.0, "tokens": 40.0, "grad_norm": 0.5,
    "learning_rate": 1e-3, "applied": 1.0, "finite": 1.0, "spike": 0.0, "loss_deviations": 0.3,
    "norm_deviations": -0.2, "loss_median": 1.9, "norm_median": 0.6, "first_loss": 2.5, "diverged": 0.0,
}  # fmt: skip
SPIKE = {"spike": 1.0, "nll": 90.0, "loss_deviations": 41.2, "norm_deviations": 7.0}
NONFINITE = {"finite": 0.0, "applied": 0.0, "objective": math.nan, "nll": math.nan}


def at(step, total=1000, **changed):
    return StepInfo(step, total, {**SUMS, **changed}, rows_nll=jnp.asarray([[1.0, 9.0]]))


class Watched:
    """A guard, and all that it says and writes."""

    def __init__(self, **policy):
        self.said, self.written, self.files = [], [], {}
        self.standing = Standing()
        rules = {"on_spike": "log", "on_nonfinite": "stop", "on_divergence": "stop", "window": 8} | policy
        rules = {"max_skipped": 20, "max_rollbacks": 2} | rules
        self.guard = Guard(
            self.standing, Policy(**rules), self.rows, lambda *x: self.written.append(x), self.file, self.said.append
        )  # fmt: skip

    def rows(self, step, nll):
        np.testing.assert_array_equal(nll, [1.0, 9.0])
        return {"source": ["t.jsonl"] * 6, "row": [8 * step + i for i in range(6)]}

    def file(self, step, columns):
        self.files[step] = columns
        return f"spikes/{step}"

    def __call__(self, *args, **named):
        return self.guard(at(*args, **named))


def test_an_ordinary_step_is_not_worth_a_word():
    watched = Watched()
    assert watched(1) is None
    assert (watched.said, watched.written, watched.files) == ([], [], {})


def test_a_spike_is_told_with_its_size_and_its_rows():
    watched = Watched()
    assert watched(12, **SPIKE) is None
    names = "t.jsonl, row 96; t.jsonl, row 97; t.jsonl, row 98; t.jsonl, row 99; and 2 more"
    assert watched.said == [
        "step 12: a spike: nll 9 is 41.2 deviations above the recent median 1.9 (gradient norm 0.5, median 0.6). "
        f"The update was applied (guard.on_spike = log). Its rows, the worst first: {names}; see spikes/12"
    ]
    facts = {"train/spike": 41.2, "train/spike_kind": "loss", "train/spike_median": 1.9, "train/rows": names}
    assert watched.written == [(12, facts)]
    assert list(watched.files) == [12]
    watched(13, **SPIKE | {"norm_deviations": 50.0})
    assert watched.written[1][1]["train/spike_kind"] == "gradient norm"
    assert watched.standing.spikes == 2


@pytest.mark.parametrize("broken", [{"objective": math.nan}, {"grad_norm": math.inf}])
def test_a_step_that_is_not_finite_is_told_with_its_rows(broken):
    watched = Watched(on_nonfinite="skip")
    assert watched(3, **NONFINITE | {"objective": 1.0} | broken) is None
    what = "loss" if "objective" in broken else "gradient"
    assert watched.said[0].startswith(
        f"step 3: the {what} is not finite; the update was not applied. Its rows"
    )
    assert watched.written[0][1]["train/nonfinite"] == 1
    assert "row 24" in watched.written[0][1]["train/rows"]
    assert list(watched.files) == [3]


@pytest.mark.parametrize(
    ("key", "what"), [("on_spike", SPIKE | {"applied": 0.0}), ("on_nonfinite", NONFINITE)]
)
def test_each_policy_decides_as_it_says(key, what):
    stopping, skipping = Watched(**{key: "stop"}), Watched(**{key: "skip"}, max_skipped=2)
    verdict = stopping(5, **what)
    assert isinstance(verdict, Stop)
    assert (verdict.status, f"guard.{key} = stop" in verdict.reason) == ("diverged", True)
    assert [skipping(step, **what) for step in (5, 6)] == [None, None]
    verdict = skipping(7, **what)
    assert isinstance(verdict, Stop)
    assert "3 updates were skipped (guard.max_skipped = 2)" in verdict.reason
    assert skipping.standing.skipped == 3

    rolling = Watched(**{key: "rollback"}, max_rollbacks=1)
    verdict = rolling(5, **what)
    assert isinstance(verdict, Rollback)
    assert verdict.step == 5
    rolling.standing.rollbacks.append({"step": 5})
    verdict = rolling(6, **what)
    assert isinstance(verdict, Stop)
    assert (verdict.status, "after 1 rollback (guard.max_rollbacks)" in verdict.reason) == ("diverged", True)


def test_divergence_stops_or_is_said_once():
    stopping, logging = Watched(), Watched(on_divergence="log")
    verdict = stopping(40, diverged=1.0, loss_median=9.0)
    assert isinstance(verdict, Stop)
    assert verdict.reason.startswith("the median nll of the last 8 steps is 9, the first was 2.5")
    assert [logging(step, diverged=float(step != 41), loss_median=9.0) for step in range(40, 45)] == [
        None
    ] * 5
    assert len(logging.said) == 1
    assert logging.written == [(40, {"train/diverged": 1})]
    assert logging.standing.diverged == 40


def test_spikes_at_every_step_don_t_fill_the_terminal_and_none_is_lost():
    watched = Watched()
    total = 3 * QUIET
    for step in range(1, total + 1):
        watched(step, total=total, **SPIKE)
    assert len(watched.files) == len(watched.written) == total
    assert len(watched.said) == SHOWN + 2 + 1
    told = [int(line.split(" more since")[0].rpartition("(")[2]) for line in watched.said[SHOWN:-1]]
    last = int(watched.said[-1].split(" more since")[0])
    assert SHOWN + len(told) + sum(told) + last == total

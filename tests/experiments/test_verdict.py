"""Each rule of the verdict finds what was planted, and is silent at its nearest miss."""

import math

import numpy as np
import pytest

from jaxlora.experiments import training_rules
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.records import Curves
from jaxlora.experiments.verdict import Earlier, Reading, verdict
from tests.experiments.drawn import level, rule, run

draw = np.random.default_rng(0)
NOISE = 0.03 * draw.normal(size=400)


def smooth(points=400, **how):
    return level(points, **how) + NOISE[:points]


# ---- spikes --------------------------------------------------------------------------------------------------------


def with_spike(height, at=200, width=3):
    nll = smooth()
    nll[at : at + width] += height
    return run(nll)


def test_a_spike_is_found_with_its_step_and_size():
    found = rule("spike", with_spike(1.0))
    assert found is not None
    assert 2010 <= found.numbers["step"] <= 2030
    assert found.numbers["value"] == pytest.approx(smooth()[200:203].max() + 1, abs=0.1)
    assert found.numbers["deviations"] > 6
    assert "back by step 2,0" in found.text


@pytest.mark.parametrize("height", [0.12, -1.0])
def test_nearest_miss_a_bump_or_a_dip_is_no_spike(height):
    assert rule("spike", with_spike(height)) is None


def test_a_spike_that_never_comes_back_is_said_to():
    assert "not back since" in rule("spike", with_spike(1.0, at=200, width=200)).text


def test_several_spikes_are_counted_once_each():
    nll = smooth()
    for at in (100, 200, 300):
        nll[at : at + 5] += 1 + at / 1000
    found = rule("spike", run(nll))
    assert found.numbers["count"] == 3
    assert found.text.startswith("3 loss spikes")


def test_what_the_guard_saw_between_two_logged_steps_counts():
    made = run(smooth())
    steps = np.sort(np.append(made.train.steps, 2003))
    values = {
        "train/nll": np.insert(made.train.values["train/nll"], 200, np.nan),
        "train/spike": np.where(steps == 2003, 14.0, np.nan),
        "train/spike_median": np.where(steps == 2003, 0.9, np.nan),
    }
    for kind, expected in (("loss", True), ("gradient norm", False)):
        object.__setattr__(made, "train", Curves(steps, values, {"train/spike_kind": {2003: kind}}))
        found = rule("spike", made)
        assert (found is not None) == expected
    object.__setattr__(made, "train", Curves(steps, values, {"train/spike_kind": {2003: "loss"}}))
    assert "step 2,003" in rule("spike", made).text


def test_the_thresholds_are_those_of_the_guard():
    from jaxlora.config.schema import GuardConfig
    from jaxlora.experiments import thresholds
    from jaxlora.training import spikes

    guard = GuardConfig()
    assert (guard.threshold, guard.window) == (thresholds.SPIKE, thresholds.WINDOW)
    assert (thresholds.LOSS_FLOOR, thresholds.NORM_FLOOR, thresholds.CAUTION) == (
        spikes.LOSS_FLOOR, spikes.NORM_FLOOR, spikes.CAUTION
    )  # fmt: skip


# ---- divergence and its risk ---------------------------------------------------------------------------------------


def test_divergence_by_the_curve():
    nll = smooth()
    nll[300:] += np.linspace(0, 4, 100)
    found = rule("divergence", run(nll))
    assert 3000 < found.numbers["step"] < 3700
    assert rule("convergence", run(nll), run(smooth())) is None


def test_nearest_miss_a_spike_that_comes_back_just_before_the_end():
    nll = smooth()
    nll[340:360] += 4
    assert rule("divergence", run(nll)) is None


def test_nearest_miss_a_slight_rise_is_no_divergence():
    assert rule("divergence", run(smooth() + np.linspace(0, 0.25, 400))) is None


def test_nearest_miss_harder_batches_at_the_end_while_eval_is_fine():
    nll = smooth()
    nll[300:] += 1.2
    evals = {1000: 1.2, 2000: 1.1, 3000: 1.05, 4000: 1.04}
    assert rule("divergence", run(nll)) is not None
    assert rule("divergence", run(nll, evals)) is None
    assert rule("divergence", run(nll, evals | {4000: 2.4})) is not None


def test_divergence_that_the_run_recorded():
    reason = "the median nll of the last 32 steps is 9, the first was 2 (guard.on_divergence = stop)"
    found = rule("divergence", run(smooth(50), status="diverged", record={"reason": reason}))
    assert found.text == "diverges at step 500: the median nll of the last 32 steps is 9, the first was 2"
    marked = np.full(50, np.nan)
    marked[30] = 1
    assert rule("divergence", run(smooth(50), train__diverged=marked)).numbers["step"] == 310


def test_a_loss_that_is_not_finite_at_the_end_diverges_and_one_in_between_does_not():
    nll = smooth(100)
    nll[90:] = np.inf
    assert rule("divergence", run(nll)).numbers["step"] == 910
    nll = smooth(100)
    nll[50] = np.inf
    assert rule("divergence", run(nll)) is None


def test_a_rising_gradient_norm_is_a_risk():
    norm = np.exp(0.2 * NOISE / 0.03)
    rising = norm * np.geomspace(1, 8, 400)
    found = rule("risk", run(smooth(), norm=rising))
    assert found.numbers["late_norm"] / found.numbers["early_norm"] > 1.9
    assert rule("steady", run(smooth(), norm=rising)) is None


def test_nearest_miss_a_norm_that_rises_by_half_or_jumps_about():
    norm = np.exp(0.2 * NOISE / 0.03)
    assert rule("risk", run(smooth(), norm=norm * np.linspace(1, 1.5, 400))) is None
    assert rule("risk", run(smooth(), norm=np.exp(0.8 * NOISE / 0.03))) is None
    hill = np.repeat(
        [1.0, 1.0, 5.0, 5.0, 2.5], [100, 60, 40, 100, 100]
    )  # higher at the end, but on its way down
    assert rule("risk", run(smooth(), norm=norm * hill)) is None


def test_repeated_small_spikes_are_a_risk_and_two_are_not():
    nll = smooth()
    seen = Curve(run(nll))
    for at in (100, 200, 300):
        if at == 300:
            assert rule("risk", run(nll)) is None
        one = (nll[at] - seen.median[at]) / seen.deviations[at]
        nll[at] = seen.median[at] + 5.2 * one
    found = rule("risk", run(nll))
    assert found.numbers["small_spikes"] == 3
    assert rule("spike", run(nll)) is None


# ---- convergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.0, "as fast"),
        (1.25, "slightly slower"),
        (2.0, "converges slower"),
        (4.0, "much slower"),
        (0.5, "converges faster"),
        (0.8, "slightly faster"),
        (0.3, "much faster"),
    ],
)
def test_convergence_finds_the_planted_factor(factor, words):
    other = 0.03 * np.random.default_rng(9).normal(size=400)
    found = rule("convergence", run(level(400, speed=20 / factor) + other), run(smooth()))
    assert words in found.text
    assert found.numbers["factor"] == pytest.approx(factor, rel=0.12)


def test_a_level_that_is_never_reached():
    found = rule("convergence", run(level(400, start=2.6, end=2.3) + NOISE), run(smooth()))
    assert "is not reached in 4,000 steps" in found.text
    assert found.numbers["at_least"] > 2
    assert all(math.isfinite(value) for value in found.numbers.values())


def test_a_run_that_gets_stuck_and_one_that_is_but_slow():
    flat = np.concatenate([level(40, start=2.6, end=1.9), np.full(360, 1.9)]) + NOISE
    found = rule("stuck", run(flat), run(smooth()))
    assert found.numbers["level"] == pytest.approx(1.9, abs=0.05)
    assert rule("steady", run(flat), run(smooth())) is None
    assert rule("stuck", run(level(400, speed=1.5) + NOISE), run(smooth())) is None
    near = np.concatenate([level(40, end=1.1), np.full(360, 1.1)]) + NOISE
    assert rule("stuck", run(near), run(smooth())) is None
    assert rule("steady", run(near), run(smooth())) is not None


def test_a_run_too_short_to_reach_a_level_is_not_blamed():
    assert "as fast" in rule("convergence", run(smooth()[:20]), run(smooth())).text


def test_smaller_batches_are_told_by_the_example_too():
    old = run(smooth(), config={"train.batch_size": 128})
    new = run(level(400, speed=10) + NOISE, config={"train.batch_size": 64})
    found = rule("convergence", new, old)
    assert found.numbers["factor_examples"] == pytest.approx(found.numbers["factor"] / 2)


def test_convergence_says_nothing_of_a_few_points_or_of_another_model():
    assert rule("convergence", run(smooth()[:7]), run(smooth())) is None
    other = run(smooth(), config={"model.path": "some/Other"})
    assert rule("convergence", other, run(smooth())) is None
    assert "another model" in rule("data", other, run(smooth())).text


def test_smoothed_losses_are_not_compared():
    def smoothed(value):
        made = run(smooth(), config={"optim.label_smoothing": value})
        object.__setattr__(made, "train", Curves(made.train.steps, {"train/loss": smooth() + 10 * value}))
        return made

    assert rule("convergence", smoothed(0.1), smoothed(0.0)) is None
    assert "label smoothing" in rule("data", smoothed(0.1), smoothed(0.0)).text
    assert rule("convergence", smoothed(0.1), smoothed(0.1)) is not None


def test_a_curve_like_that_of_another_run_than_the_baseline():
    base, twin = run(smooth(), name="base"), run(level(400, speed=8) + NOISE, name="twin")
    new = run(level(400, speed=8) + NOISE[::-1], name="new")
    readings, earlier = [Reading(base), Reading(twin)], Earlier(2)
    for reading in readings:
        earlier.add(reading.curve)
    found = {f.kind: f for f in verdict(Reading(new), readings[0], earlier)}
    assert found["alike"].text == "train curve like that of twin"
    same = {f.kind for f in verdict(Reading(new), readings[1], earlier)}
    assert "alike" not in same
    unlike = run(level(400, speed=9.5) + NOISE[::-1])
    assert "alike" not in {f.kind for f in verdict(Reading(unlike), readings[0], earlier)}


def test_steps_are_crossed_between_logged_ones():
    nll = np.linspace(3, 1, 21)
    assert training_rules._reached(Curve(run(nll)), 2.05) == pytest.approx(105)

"""Each rule of the verdict finds what was planted, and is silent at its nearest miss."""

import math

import numpy as np
import pytest

from jaxlora.experiments import eval_rules, training_rules
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.eval_rules import Evaluations
from jaxlora.experiments.records import Curves
from jaxlora.experiments.verdict import Earlier, Reading, verdict
from tests.experiments.drawn import level, run, table

draw = np.random.default_rng(0)
NOISE = 0.03 * draw.normal(size=400)
TOKENS = np.random.default_rng(1).integers(5, 100, 200)
HARD = np.random.default_rng(2).normal(0, 0.5, 200)
HARD -= TOKENS @ HARD / TOKENS.sum()


def smooth(points=400, **how):
    return level(points, **how) + NOISE[:points]


def rule(name, made, old=None):
    """What a verdict says of one kind, None for nothing."""
    found = verdict(Reading(made), Reading(old) if old else None)
    return next((finding for finding in found if finding.kind == name), None)


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


def test_a_run_too_short_to_reach_a_level_is_not_blamed():
    assert "as fast" in rule("convergence", run(smooth()[:60]), run(smooth())).text


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


# ---- eval nll against the baseline ---------------------------------------------------------------------------------


def evaluated(nll, seed=3, tokens=TOKENS, spread=0.1, name="run", **more):
    """A run with one evaluation of 200 examples, whose token-weighted mean is `nll`."""
    own = np.random.default_rng(seed).normal(0, spread, len(tokens))
    own -= tokens @ own / tokens.sum()
    losses = nll + HARD + own
    steps = {100: nll + 0.5, 200: nll + 0.2, 300: nll}
    return run(smooth(100), steps, tables={300: table(losses, tokens)}, name=name, **more)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (-0.05, "eval nll better by 0.05"),
        (0.05, "eval nll worse by 0.05"),
        (0.002, "no difference in eval nll"),
    ],
)
def test_eval_nll_is_compared_example_by_example(change, words):
    found = rule("eval", evaluated(1.5 + change), evaluated(1.5, seed=4))
    assert found.text.startswith(words)
    assert found.numbers["difference"] == pytest.approx(change, abs=1e-9)
    assert found.numbers["low"] < change < found.numbers["high"]
    assert "paired over 200 examples" in found.text


def test_a_difference_that_is_certain_and_tiny_is_not_called_better():
    found = rule("eval", evaluated(1.5 - 0.003, spread=0.001), evaluated(1.5, seed=4, spread=0.001))
    assert found.numbers["high"] < 0
    assert "no difference in eval nll that matters" in found.text
    assert "significant" not in found.numbers


def test_without_examples_it_is_marked_as_unpaired():
    old, new = (run(smooth(100), {100: 2.0, 200: 1.7, 300: nll}) for nll in (1.5, 1.4))
    found = rule("eval", new, old)
    assert found.text.startswith("lower eval nll: 1.40 against 1.50 (unpaired")
    assert "low" not in found.numbers
    near = rule("eval", run(smooth(100), {100: 2.0, 200: 1.7, 300: 1.48}), old)
    assert near.text.startswith("about the same eval nll")


def test_other_eval_data_is_compared_as_unpaired_with_an_interval():
    old = evaluated(1.5, record={"data": {"eval": {"fingerprint": "a"}}})
    new = evaluated(1.4, seed=4, record={"data": {"eval": {"fingerprint": "b"}}})
    found = rule("eval", new, old)
    assert "unpaired, since other eval data" in found.text
    assert found.text.startswith("about the same")  # the interval of means of so different examples is wide
    assert found.numbers["high"] - found.numbers["low"] > 0.1


def test_examples_of_other_lengths_are_not_paired():
    """Another tokenizer, or other cuts: the numbers are of other tokens."""
    other = np.random.default_rng(8).integers(5, 100, 200)
    assert rule("eval", evaluated(1.5, tokens=other), evaluated(1.4)).numbers["paired"] == 0


# ---- its course ----------------------------------------------------------------------------------------------------

FALLING = dict(zip(range(100, 1100, 100), (1.2 + 0.6 * 0.6 ** np.arange(10)).tolist(), strict=True))


def course(*values, every=100):
    return {every * (i + 1): value for i, value in enumerate(values)}


def test_overfitting_by_the_curve_with_its_beginning_and_size():
    evals = course(1.8, 1.5, 1.40, 1.42, 1.45, 1.48, 1.50)
    found = rule("overfitting", run(smooth(70), evals))
    assert found.numbers["since"] == 300
    assert found.numbers["rise"] == pytest.approx(0.08)


@pytest.mark.parametrize(
    "evals",
    [
        course(1.8, 1.5, 1.40, 1.42, 1.45),  # two evaluations after the minimum are too few
        course(1.8, 1.5, 1.400, 1.402, 1.401, 1.403, 1.402),  # less than one per cent
        course(1.8, 1.7, 1.40, 1.62, 1.41, 1.60, 1.42, 1.61),  # as large as their noise
    ],
)
def test_nearest_misses_of_overfitting(evals):
    assert rule("overfitting", run(smooth(80), evals)) is None


def test_a_rise_while_train_nll_rises_too_is_not_overfitting():
    evals = course(1.8, 1.5, 1.40, 1.42, 1.45, 1.48, 1.50)
    nll = np.concatenate([level(30), np.linspace(0.9, 1.1, 40)])
    made = run(nll, evals)
    assert eval_rules.overfitting(Evaluations(made), Curve(made)) is None


def paired_course(rise, spread):
    """Six evaluations of 200 examples; from the third on, the mean rises by `rise` each."""
    means = [1.8, 1.5, 1.4, 1.4 + rise, 1.4 + 2 * rise, 1.4 + 3 * rise]
    tables = {}
    for index, mean in enumerate(means):
        own = np.random.default_rng(index).normal(0, spread, 200)
        tables[100 * (index + 1)] = table(mean + HARD + own - TOKENS @ own / TOKENS.sum(), TOKENS)
    return run(smooth(60), course(*means), tables=tables)


def test_overfitting_by_examples():
    assert rule("overfitting", paired_course(0.008, 0.02)).numbers["since"] == 300
    assert (
        rule("overfitting", paired_course(0.008, 0.5)) is None
    )  # within what the examples' own changes explain


def test_overfitting_as_the_run_recorded_it():
    record = {"overfit": {"since": 200, "found": 400, "eval_rise": 0.05}}
    assert rule("overfitting", run(smooth(60), FALLING, record=record)).numbers["since"] == 200


def test_plateau():
    found = rule("plateau", run(smooth(100), course(2.0, 1.52, 1.50, 1.49, 1.51, 1.50)))
    assert found.text == "eval nll stays near 1.50 from step 200 on"


@pytest.mark.parametrize(
    "evals",
    [
        course(2.0, 1.9, 1.8, 1.7, 1.51, 1.50, 1.50),
        course(2.0, 1.56, 1.50, 1.44, 1.51, 1.50),
        course(1.5, 1.5),
    ],
)
def test_nearest_misses_of_a_plateau(evals):
    assert rule("plateau", run(smooth(100), evals)) is None


def test_undertrained():
    evals = course(2.0, 1.8, 1.7, 1.62, 1.55, 1.49)
    found = rule("undertrained", run(smooth(60), evals))
    assert found.numbers["fall"] == pytest.approx(0.13)
    assert rule("undertrained", run(smooth(60), course(2.0, 1.6, 1.51, 1.502, 1.5, 1.499))) is None
    assert rule("undertrained", run(smooth(60), course(2.0, 1.8, 1.7, 1.62, 1.49, 1.55))) is None


def test_an_early_stop_and_whether_it_was_too_early():
    def stopped(evals, **more):
        return rule(
            "early_stop", run(smooth(60), evals, status="stopped_early", record={"total_steps": 1000}, **more)
        )

    flat = stopped(course(2.0, 1.6, 1.51, 1.50, 1.50, 1.50))
    assert flat.text == "stops early, at step 600 of 1,000"
    assert not flat.numbers["too_early"]
    falling = stopped(course(2.0, 1.8, 1.7, 1.62, 1.55, 1.49))
    assert "too early: eval nll was still falling" in falling.text
    warm = stopped(course(1.5, 1.5, 1.5), config={"optim.warmup_steps": 800})
    assert "inside the warmup of 800 steps: too early" in warm.text
    assert rule("early_stop", run(smooth(60), FALLING)) is None


def test_very_early_is_within_a_quarter():
    made = run(smooth(60), course(1.5, 1.5, 1.5), status="stopped_early", record={"total_steps": 2400})
    assert "very early" in rule("early_stop", made).text
    made = run(smooth(61), course(1.5, 1.5, 1.5), status="stopped_early", record={"total_steps": 2400})
    assert "very early" not in rule("early_stop", made).text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("running", "unfinished: still running or killed at step 600 of 1,000"),
        ("preempted", "unfinished: interrupted at step 600 of 1,000 (why)"),
        ("failed", "unfinished: failed at step 600 of 1,000 (why)"),
        ("", "unfinished: its curves end at step 600 of 1,000"),
    ],
)
def test_unfinished(status, words):
    reason = {} if status in ("running", "") else {"reason": "why"}
    made = run(smooth(60), FALLING, status=status, record={"total_steps": 1000, "steps": 600} | reason)
    object.__setattr__(
        made, "eval", Curves(made.eval.steps[:5], {"eval/nll": made.eval.values["eval/nll"][:5]})
    )
    assert rule("unfinished", made).text == words
    assert rule("unfinished", run(smooth(60), FALLING)) is None


@pytest.mark.parametrize(
    ("count", "words"), [(0, "no evaluation"), (1, "only 1 evaluation:"), (2, "only 2 evaluations")]
)
def test_fewer_than_three_evaluations_say_so_and_carry_no_course(count, words):
    evals = dict(list(course(1.4, 1.9, 2.4).items())[:count])
    found = {f.kind: f for f in verdict(Reading(run(smooth(60), evals)), None)}
    assert words in found["data"].text
    assert not {"overfitting", "plateau", "undertrained"} & found.keys()
    assert "data" not in {f.kind for f in verdict(Reading(run(smooth(60), course(1.4, 1.9, 2.4))), None)}


def test_a_run_of_which_there_is_nothing():
    found = verdict(Reading(run()), None)
    assert {f.kind for f in found} == {"data"}
    assert "no train loss was logged" in found[1].text


def test_where_it_ended():
    found = rule("level", run(np.linspace(3, 1, 100), course(1.8, 1.5, 1.6)))
    assert found.numbers == {"train": pytest.approx(1.09, abs=0.01), "eval": 1.5, "best_step": 200}


def test_steps_are_crossed_between_logged_ones():
    nll = np.linspace(3, 1, 21)
    assert training_rules._reached(Curve(run(nll)), 2.05) == pytest.approx(105)

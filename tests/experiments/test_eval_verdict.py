"""What is said of evaluations: against the baseline, and of their course; what was planted, and its nearest miss."""

import numpy as np
import pytest

from jaxlora.experiments import eval_rules
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.eval_rules import Evaluations
from jaxlora.experiments.records import Curves
from jaxlora.experiments.verdict import Reading, verdict
from tests.experiments.drawn import level, rule, run, table

NOISE = 0.03 * np.random.default_rng(0).normal(size=400)
TOKENS = np.random.default_rng(1).integers(5, 100, 200)
HARD = np.random.default_rng(2).normal(0, 0.5, 200)
HARD -= TOKENS @ HARD / TOKENS.sum()


def smooth(points):
    return level(points) + NOISE[:points]


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


def test_another_model_is_compared_where_it_reads_the_same_tokens():
    large = {"model.path": "some/Larger"}
    found = {
        f.kind: f for f in verdict(Reading(evaluated(1.2, config=large)), Reading(evaluated(1.5, seed=4)))
    }
    assert found["eval"].text.startswith("eval nll better by 0.30")
    assert "convergence" not in found
    other = np.random.default_rng(8).integers(5, 100, 200)
    new = evaluated(1.2, tokens=other, config=large)
    found = {f.kind: f for f in verdict(Reading(new), Reading(evaluated(1.5, seed=4)))}
    assert found["data"].text == "not compared with run, which has another model"


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


def test_a_course_that_turned_up_at_its_very_end_is_not_still_falling():
    jitter = [0.005 * (-1) ** i for i in range(8)]
    falling = [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3]
    assert rule("undertrained", run(smooth(80), course(*np.add(falling, jitter)))) is not None
    assert rule("undertrained", run(smooth(80), course(*np.add([*falling[:-1], 1.46], jitter)))) is None


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

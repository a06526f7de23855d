"""How often the journal is wrong: false alarms over healthy runs, planted faults, the coverage of its intervals."""

import collections

import numpy as np
import pytest

from jaxlora.experiments import training_rules
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.intervals import interval, unpaired
from jaxlora.experiments.verdict import Reading, verdict
from tests.experiments.drawn import healthy, level, run, table

RUNS = 1000


def kinds(made):
    return {finding.kind for finding in verdict(Reading(made), None)}


@pytest.fixture(scope="module")
def said():
    """Kind -> how many of 1,000 healthy runs it is said of."""
    draw = np.random.default_rng(0)
    return collections.Counter(kind for number in range(RUNS) for kind in kinds(healthy(draw, number)))


@pytest.mark.parametrize("kind", ["spike", "divergence", "overfitting", "risk"])
def test_false_alarms_are_under_one_per_cent(said, kind):
    assert said[kind] < 0.01 * RUNS


def test_healthy_runs_are_called_steady(said):
    assert said["steady"] > 0.95 * RUNS


def planted(draw, number, kind):
    made = healthy(draw, number)
    nll = made.train.values["train/nll"].copy()
    norm = made.train.values["train/grad_norm"].copy()
    evals = dict(zip(made.eval.steps.tolist(), made.eval.values["eval/nll"].tolist(), strict=True))
    last = len(nll)
    if kind == "spike":
        at = int(draw.integers(last // 2, last - 2))
        nll[at : at + 2] *= 3.5
    if kind == "divergence":
        at = last // 2
        nll[at:] += np.linspace(0, 2 * nll[0], last - at)
        evals = {step: value + (3 * value if step > at * 10 else 0) for step, value in evals.items()}
    if kind == "overfitting":
        place = np.array(list(evals)) / (last * 10)
        level = np.array(list(evals.values()))
        rise = 0.4 * level.mean() * np.clip(place - 0.4, 0, 1)
        evals = dict(zip(evals, (level + rise).tolist(), strict=True))
    if kind == "risk":
        norm *= np.geomspace(1, 12, last)
    return run(nll, evals, norm)


@pytest.mark.parametrize("kind", ["spike", "divergence", "overfitting", "risk"])
def test_planted_faults_are_found(kind):
    """In runs of 100 logged losses and 10 evaluations or more; shorter ones leave less to go by."""
    draw = np.random.default_rng(1)
    found = tried = number = 0
    while tried < 60:
        number += 1
        made = planted(draw, number, kind)
        if len(made.train.steps) >= 100 and len(made.eval.steps) >= 10:
            tried += 1
            found += kind in kinds(made)
    assert found >= 0.9 * tried


def test_alike_runs_are_rarely_called_faster_or_slower():
    """The same course, twice with other noise: 12 to 1,000 logged steps, noise of 2 to 10 per cent."""
    draw = np.random.default_rng(2)
    wrong = 0
    for number in range(600):
        points = (12, 40, 100, 1000)[number % 4]
        course = level(points, speed=draw.uniform(5, 40))
        pair = [
            Curve(run(course * (1 + draw.uniform(0.02, 0.1) * draw.normal(size=points)))) for _ in range(2)
        ]
        found = training_rules.convergence(*pair)
        wrong += found is not None and "as fast" not in found.text
    assert wrong <= 0.015 * 600


# ---- examples ------------------------------------------------------------------------------------------------------


def overfit_course(draw, rise):
    """Twelve evaluations of 150 examples, level from the fourth on or rising; checkpoints differ by chance too."""
    tokens = draw.integers(5, 200, 150)
    hard = draw.normal(1.5, 0.6, 150)
    means = 0.8 * 0.3 ** np.arange(12.0) + draw.uniform(0, 0.006) * draw.normal(size=12)
    means += rise * np.clip(np.arange(12) - 3, 0, None)
    evals, tables = {}, {}
    for index, mean in enumerate(means):
        losses = hard + mean + 0.03 * draw.normal(size=150)
        tables[100 * (index + 1)] = table(losses, tokens)
        evals[100 * (index + 1)] = float(tokens @ losses / tokens.sum())
    return run(level(120) + 0.03 * draw.normal(size=120), evals, tables=tables)


def test_overfitting_by_examples_is_found_and_no_false_alarm():
    draw = np.random.default_rng(3)
    false = sum("overfitting" in kinds(overfit_course(draw, 0.0)) for _ in range(400))
    found = sum("overfitting" in kinds(overfit_course(draw, 0.012)) for _ in range(50))
    assert false < 0.01 * 400
    assert found >= 0.9 * 50


def pair(draw, count, difference, growing):
    """Two evaluations of the same examples. The difference is the token-weighted mean over endless examples:

    with changes a + growing (w - E w), it is a + growing Var(w) / E w.
    """
    tokens = draw.integers(20, 300, count)
    hard = draw.normal(1.5, 0.8, count)
    middle, spread = 159.5, (280**2 - 1) / 12  # of the integers from 20 to 299
    change = difference - growing * spread / middle + growing * (tokens - middle)
    new = hard + change + 0.25 * draw.normal(size=count)
    return table(hard, tokens), table(new, tokens)


@pytest.mark.parametrize(("count", "growing"), [(200, 0.0), (200, 0.001), (30, 0.0), (12, 0.0)])
def test_paired_intervals_contain_the_planted_difference(count, growing):
    draw = np.random.default_rng(4)
    inside = 0
    for _ in range(1000):
        found = interval(*pair(draw, count, 0.02, growing))
        assert found is not None
        assert found.paired
        inside += found.low <= 0.02 <= found.high
    assert 930 <= inside <= 970


def test_a_difference_that_is_none_is_called_one_in_five_per_cent_and_a_large_one_is_always():
    draw = np.random.default_rng(5)
    # A standard error is 0.25 / sqrt(200 / 1.26), 0.02: of the second, five.
    for difference, least, most in ((0.0, 30, 70), (0.1, 990, 1000)):
        called = 0
        for _ in range(1000):
            found = interval(*pair(draw, 200, difference, 0.0))
            assert found is not None
            called += found.low > 0 or found.high < 0
        assert least <= called <= most


def test_unpaired_intervals_have_their_coverage_too_and_are_wider():
    draw = np.random.default_rng(6)
    inside, widths = 0, []
    for _ in range(1000):
        (old, _), (_, new) = pair(draw, 150, 0.0, 0.0), pair(draw, 100, 0.02, 0.0)
        found = unpaired(old, new)
        assert found is not None
        inside += found.low <= 0.02 <= found.high
        paired = interval(*pair(draw, 150, 0.02, 0.0))
        assert paired is not None
        widths.append((found.high - found.low) / (paired.high - paired.low))
    assert 930 <= inside <= 970
    assert np.mean(widths) > 3

"""Each rule of advice speaks where it should, with its source, and is silent at its nearest miss."""

import re

import numpy as np
import pytest

from jaxlora.experiments.advice import RULES, Case, Rates, advise, tried
from jaxlora.experiments.changes import differing
from jaxlora.experiments.verdict import Reading, verdict
from tests.experiments.drawn import level, run

FLAT = {100: 2.0, 200: 1.52, 300: 1.50, 400: 1.51, 500: 1.50, 600: 1.50}
NOISE = 0.02 * np.random.default_rng(0).normal(size=60)


def made(evals=FLAT, end=1.3, nll=None, **more):
    config = {"lora.rank": 16, "lora.alpha": 32.0, "train.epochs": 3.0, "train.max_steps": 0} | more.pop(
        "config", {}
    )
    record = {"total_steps": 600} | more.pop("record", {})
    nll = level(60, start=2.6, end=end) + NOISE if nll is None else nll
    return run(nll, evals, config=config, record=record, **more)


def advice(new, old=None, rates=None):
    new, old = Reading(new), Reading(old) if old else None
    changes = tuple(differing(old.run, new.run)) if old else ()
    found = {finding.kind: finding for finding in reversed(verdict(new, old))}
    return advise(Case(new, old, changes, found, rates))


def test_every_rule_has_a_source():
    assert all(source for _, source in RULES)


def test_a_healthy_run_gets_none():
    assert advice(made()) == ""


def test_one_line_with_its_source_in_brackets():
    told = advice(made(end=0.5))
    assert "\n" not in told
    assert re.search(r"\[[A-Z].*\d{4}.*\]$", told)


def test_a_diverged_run_is_told_half_the_rate():
    told = advice(made(status="diverged"))
    assert told.startswith("try a learning rate of 5e-5, or a longer warmup [")


def test_a_stop_inside_the_warmup_comes_first():
    warm = {"optim.warmup_steps": 700}
    told = advice(made(status="stopped_early", config=warm, record={"total_steps": 2000}))
    assert "stop.min_steps = 1400" in told
    told = advice(made(status="stopped_early", record={"total_steps": 2000}))
    assert "stop.min_steps" not in told


def test_a_stop_while_eval_nll_still_fell():
    falling = {100: 2.0, 200: 1.8, 300: 1.7, 400: 1.62, 500: 1.55, 600: 1.49}
    told = advice(made(falling, status="stopped_early", config={"stop.patience": 5}))
    assert told.startswith("a larger stop.patience of 10 instead of 5")


def test_alpha_over_r_that_changed_with_the_rank():
    old = made()
    told = advice(made(config={"lora.rank": 128}), old)
    assert "lora.alpha = 256 keeps the scale" in told
    assert "Kalajdzievski 2023" in told
    assert "keeps the scale" not in advice(made(config={"lora.rank": 128, "lora.alpha": 256.0}), old)
    root = {"lora.scaling": "rslora"}
    told = advice(made(config=root | {"lora.rank": 64}), made(config=root))
    assert "lora.alpha = 64 keeps the scale" in told  # 32 / sqrt(16) = 64 / sqrt(64)


def test_a_rank_without_effect():
    larger = {"lora.rank": 128, "lora.alpha": 256.0}
    told = advice(made(config=larger), made())
    assert told.startswith("rank 128 is no better than 16: keep 16")
    assert "keep 16" not in advice(made(config=larger | {"optim.learning_rate": 2e-4}), made())


RATES = np.full(60, 1e-4)


@pytest.mark.parametrize(("decay", "share"), [(1.0, "5.8%"), (0.1, "0.6%")])
def test_a_weight_decay_too_small_to_matter(decay, share):
    """600 steps of 1e-4 shrink by 1 - exp(-0.06 decay)."""
    new = made(train__learning_rate=RATES, config={"optim.weight_decay": decay})
    told = advice(new, made(config={"optim.weight_decay": 0.0}))
    assert f"weight decay {decay:g} shrinks A and B by {share}" in told


def test_a_weight_decay_that_matters_is_not_called_too_small():
    new = made(train__learning_rate=RATES, config={"optim.weight_decay": 3.0})
    assert "shrinks" not in advice(new, made(config={"optim.weight_decay": 0.0}))


def test_the_decay_that_is_named_does_what_is_said_of_it():
    new = made(train__learning_rate=RATES, config={"optim.weight_decay": 1.0})
    named = float(
        re.search(r"; (\S+) would take 30%", advice(new, made(config={"optim.weight_decay": 0.0})))[1]
    )
    assert 1 - np.exp(-named * 0.06) == pytest.approx(0.3, abs=0.01)


def test_a_long_warmup_is_advised_about_once():
    long = {"optim.warmup_steps": 180}
    told = advice(made(config=long))
    assert told.startswith("warmup takes 180 of 600 steps (30%); 30 would leave")
    assert advice(made(config=long | {"optim.learning_rate": 2e-4}), made(config=long)) == ""
    assert advice(made(config={"optim.warmup_steps": 120})) == ""


def test_overfitting_and_evaluations_too_far_apart():
    rising = {100: 2.0, 200: 1.50, 300: 1.55, 400: 1.60, 500: 1.65, 600: 1.7}
    told = advice(made(rising, config={"seed": 1}))
    assert told.startswith(
        "fewer epochs are enough: best/ is of step 200; evaluations nearer together than 100 steps"
    )
    near = {10 * i: 1.5 + max(0.0, 0.01 * (i - 20)) + (0.5 / i) ** 2 for i in range(1, 61)}
    assert "nearer together" not in advice(made(near))
    assert advice(made(near)).startswith("fewer epochs are enough")


def test_an_undertrained_run():
    falling = {100: 2.0, 200: 1.8, 300: 1.7, 400: 1.62, 500: 1.55, 600: 1.49}
    assert advice(made(falling)).startswith("train longer (6 epochs) or at a learning rate of 2e-4")
    tried_higher = Rates((1e-4, 2e-4), 2e-4, "another")
    assert advice(made(falling), rates=tried_higher) == "train longer (6 epochs) [this log]"


def test_smoothed_losses():
    def smoothed(value):
        new = made(config={"optim.label_smoothing": value})
        for part, name in (("train", "loss"), ("eval", "loss")):
            curves = getattr(new, part)
            values = {f"{part}/{name}": curves.values[f"{part}/nll"] + 10 * value}
            object.__setattr__(new, part, type(curves)(curves.steps, values))
        return new

    assert advice(smoothed(0.1), smoothed(0.0)).startswith("compare nll, not the smoothed loss")
    assert "smoothed loss" not in advice(smoothed(0.1), smoothed(0.1))


def sweep(*nlls):
    """Runs at 1e-4, 2e-4, 4e-4, ... that differ in nothing else, and their rates."""
    runs = []
    for index, nll in enumerate(nlls):
        evals = {step: value - 1.5 + nll for step, value in FLAT.items()}
        runs.append(
            made(evals, end=nll - 0.2, name=f"run{index}", config={"optim.learning_rate": 1e-4 * 2**index})
        )
    return runs, tried([Reading(one) for one in runs])


def test_a_learning_rate_at_the_edge_of_what_was_tried():
    runs, rates = sweep(1.7, 1.6, 1.5)
    told = advice(runs[2], rates=rates[str(runs[2].path)])
    assert told.startswith("the best of the 3 learning rates tried (1e-4 to 4e-4) is the highest: try 8e-4")
    assert advice(runs[0], rates=rates[str(runs[0].path)]) == ""  # only on the winner
    runs, rates = sweep(1.5, 1.6, 1.7)
    assert "is the lowest: try 5e-5" in advice(runs[0], rates=rates[str(runs[0].path)])
    runs, rates = sweep(1.6, 1.5, 1.7)
    assert advice(runs[1], rates=rates[str(runs[1].path)]) == ""
    runs, rates = sweep(1.7, 1.5)
    assert advice(runs[1], rates=rates[str(runs[1].path)]) == ""


def test_rates_are_compared_among_runs_that_differ_in_nothing_that_matters():
    runs, _ = sweep(1.7, 1.6, 1.5)
    other = made(name="other", config={"optim.learning_rate": 8e-4, "lora.rank": 8})
    longer = made(name="longer", config={"optim.learning_rate": 8e-4, "train.epochs": 5.0})
    rates = tried([Reading(one) for one in (*runs, other, longer)])
    assert len(rates[str(other.path)].rates) == 1
    assert rates[str(longer.path)].rates == (1e-4, 2e-4, 4e-4, 8e-4)


def test_a_gap_between_train_and_eval():
    assert advice(made(end=0.5)).startswith("train nll 0.6")
    assert advice(made(end=1.1)) == ""

"""Spikes and divergence: found on invented curves as a plain computation finds them, and what the step does of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.lora import tree as lora
from jaxlora.lora.spec import TARGETS
from jaxlora.training import spikes
from jaxlora.training.step import make_train_step

WINDOW = 16


@functools.cache
def follow():
    """(losses, norms, threshold) -> the alarms of a whole curve, one compiled program for every curve."""

    def one(recent, values):
        loss, norm, threshold, counted = values
        return spikes.remember(recent, loss, norm, counted), spikes.compare(recent, loss, norm, threshold)

    return jax.jit(lambda *curve: jax.lax.scan(one, spikes.no_steps(WINDOW), curve)[1])


def alarms(losses, norms=None, threshold=6.0, counted=None):
    losses = np.asarray(losses, np.float32)
    norms = np.ones_like(losses) if norms is None else np.asarray(norms, np.float32)
    counted = np.ones(len(losses), bool) if counted is None else np.asarray(counted)
    return jax.device_get(follow()(losses, norms, np.full_like(losses, threshold), counted))


def steps_of(flags):
    return np.flatnonzero(flags).tolist()


def healthy(seed, length=200):
    """Losses that fall from 3 to 1, and gradient norms that rise from a tenth, both with the noise of small batches."""
    draw, at = np.random.default_rng(seed), np.arange(length)
    losses = (1 + 2 * np.exp(-at / 30)) * np.exp(0.1 * draw.standard_normal(length))
    return losses, (1 - 0.9 * np.exp(-at / 5)) * np.exp(0.3 * draw.standard_normal(length))


def test_deviations_are_those_of_numpy():
    losses, norms = healthy(0)
    found = alarms(losses, norms)
    for step in range(1, len(losses)):
        recent = np.float32(losses[max(0, step - WINDOW) : step])
        median = np.median(recent)
        spread = max(1.4826 * np.median(np.abs(recent - median)), 0.02 * max(median, 1.0))
        expected = (losses[step] - median) / (spread * (1 + 8 / len(recent)))
        np.testing.assert_allclose(found.loss_deviations[step], expected, rtol=1e-3, atol=1e-4)
        logs = np.log(np.float32(norms[max(0, step - WINDOW) : step]))
        spread = max(1.4826 * np.median(np.abs(logs - np.median(logs))), 0.2)
        expected = (np.log(norms[step]) - np.median(logs)) / (spread * (1 + 8 / len(recent)))
        np.testing.assert_allclose(found.norm_deviations[step], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.loss_median[step], median, rtol=1e-6)


def test_healthy_curves_raise_no_alarm():
    for seed in range(50):
        found = alarms(*healthy(seed))
        assert (steps_of(found.spike), steps_of(found.diverged)) == ([], []), seed


@pytest.mark.parametrize("step", [8, 20, 60, 199])
def test_a_spike_of_the_loss_is_found_at_its_step_and_nowhere_else(step):
    for seed in range(10):
        losses, norms = healthy(seed)
        losses[step] += 8.0
        assert steps_of(alarms(losses, norms).spike) == [step]


def test_a_spike_of_the_gradient_norm_is_found_at_its_step():
    for seed in range(10):
        losses, norms = healthy(seed)
        norms[60] *= 100
        assert steps_of(alarms(losses, norms).spike) == [60]


def test_a_fall_is_no_spike_and_a_new_level_soon_is_none_any_more():
    losses = np.r_[np.full(30, 3.0), np.full(30, 0.3)]
    assert steps_of(alarms(losses).spike) == []
    found = alarms(np.r_[np.full(30, 1.0), np.full(30, 3.0)])
    assert steps_of(found.spike) == list(range(30, 30 + WINDOW // 2))


def test_the_threshold_is_an_argument():
    losses, norms = healthy(1)
    losses[60] += 3.0
    size = alarms(losses, norms).loss_deviations[60]
    assert steps_of(alarms(losses, norms, 0.99 * size).spike) == [60]
    assert 60 not in steps_of(alarms(losses, norms, 1.01 * size).spike)


def test_divergence_is_a_full_window_that_stays_above_the_first_loss():
    start, excess = 2.0, 0.1 * 6 * 2.0
    over, under = np.full(40, start + 1.05 * excess), np.full(40, start + 0.95 * excess)
    found = alarms(np.r_[np.full(20, start), over])
    assert steps_of(found.diverged) == list(range(20 + WINDOW // 2 + 1, 60))
    assert steps_of(alarms(np.r_[np.full(20, start), under]).diverged) == []
    early = alarms(np.r_[start, over])
    assert steps_of(early.diverged)[0] == WINDOW  # never before the window is full
    assert float(found.first_loss[-1]) == start


def test_what_is_not_counted_leaves_no_trace():
    losses, norms = healthy(2)
    inserted = [5, 40, 41]
    with_gaps = [np.insert(x, inserted, np.nan) for x in (losses, norms)]
    counted = np.isfinite(with_gaps[0])
    plain, found = alarms(losses, norms), alarms(*with_gaps, counted=counted)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_array_equal(one, other[counted])
    assert not found.spike[~counted].any()


# ---- the step ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(make_tiny):
    return jax.jit(make_train_step(make_tiny().decoder))


def trained(step, tiny, state, count, rows=4):
    """The state after so many steps on one batch, and the last step's sums."""
    sums = None
    for _ in range(count):
        state, sums = step(state, tiny.base, tiny.batch(0, rows, 16, 1))
    return state, sums


def test_healthy_training_raises_no_alarm(make_tiny, step):
    """From B = 0, through the warmup, until the batches are known by heart: six seeds."""
    for seed in range(6):
        tiny = make_tiny(warmup_steps=8, total_steps=40)
        fresh = lora.init(jax.random.key(seed), tiny.base, dict.fromkeys(TARGETS, 4))
        state, losses = tiny.state._replace(adapter=fresh), []
        for n in range(40):
            state, sums = step(state, tiny.base, tiny.batch(100 * seed + n % 4, 4, 16, 1))
            losses.append(float(sums.nll / sums.weight))
            assert (float(sums.spike), float(sums.diverged)) == (0.0, 0.0), (seed, n, sums)
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_spike_is_applied_or_not_as_its_setting_says_and_remembered(make_tiny, step, skip):
    tiny = make_tiny(skip_spikes=skip)
    before, sums = trained(step, tiny, tiny.state, 8)
    assert float(sums.spike) == 0.0
    # The same batch with a base that predicts wrongly, and surely: what absurd rows are to a trained model.
    surely = {**tiny.base, "norm": {"scale": -8 * tiny.base["norm"]["scale"]}}
    after, sums = step(before, surely, tiny.batch(0, 4, 16, 1))
    assert (float(sums.spike), float(sums.applied), float(sums.finite)) == (1.0, 1.0 - skip, 1.0)
    moved = [
        bool(np.any(a != b))
        for a, b in zip(jax.tree.leaves(after.adapter), jax.tree.leaves(before.adapter), strict=True)
    ]
    assert any(moved) == (skip == 0.0)
    if skip:
        jax.tree.map(np.testing.assert_array_equal, after.moments, before.moments)
    assert int(after.recent.count) == 9
    assert float(after.recent.loss[8]) == pytest.approx(float(sums.nll / sums.weight))


@pytest.mark.slow
def test_rows_nll_are_the_means_of_the_rows(make_tiny, step):
    tiny = make_tiny()
    batch = tiny.batch(0, 4, 16, 2)
    _, sums = step(tiny.state, tiny.base, batch)
    assert sums.rows_nll.shape == (2, 2)
    trained_tokens = batch["weights"].sum(-1)
    np.testing.assert_allclose((sums.rows_nll * trained_tokens).sum(), sums.nll, rtol=1e-5)
    assert float(sums.rows_nll[0, 0]) == 0.0  # it has no trained token
    alone = {name: x[1:, 1:] for name, x in batch.items()}
    np.testing.assert_allclose(
        step(tiny.state, tiny.base, alone)[1].rows_nll[0, 0], sums.rows_nll[1, 1], rtol=1e-5
    )


def test_a_stack_of_states_is_compared_each_with_its_own(make_tiny):
    stacked = jax.vmap(spikes.no_steps, axis_size=2, in_axes=None)(WINDOW)
    values = [jnp.asarray([1.0, 3.0]), jnp.ones(2), jnp.asarray([True, True])]
    for _ in range(10):
        stacked = jax.vmap(spikes.remember)(stacked, *values)
    found = jax.vmap(spikes.compare, in_axes=(0, 0, 0, None))(stacked, jnp.full(2, 3.0), values[1], 6.0)
    assert found.spike.tolist() == [True, False]

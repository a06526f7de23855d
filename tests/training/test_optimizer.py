"""The schedule and the optimiser are the field's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxlora.training.optimizer import OptimizerSettings, decay_budget, learning_rate, optimizer

SETTINGS = OptimizerSettings(
    learning_rate=2e-3, warmup_steps=7, total_steps=50, final_fraction=0.0, weight_decay=0.1,
    b1=0.9, b2=0.99, eps=1e-8, clip_norm=0.5,
)  # fmt: skip


@pytest.mark.parametrize(("warmup", "total"), [(7, 50), (0, 20), (1, 2), (30, 31)])
def test_schedule_is_transformers(warmup, total):
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=2e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(theirs, warmup, total)
    settings = SETTINGS._replace(warmup_steps=warmup, total_steps=total)
    for step in range(total + 1):
        ours = float(learning_rate(settings, step))
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-5, abs=1e-10), step
        theirs.step()
        schedule.step()


def test_final_fraction_is_where_the_schedule_ends_and_stays():
    settings = SETTINGS._replace(final_fraction=0.25)
    for step in (50, 60):
        assert float(learning_rate(settings, step)) == pytest.approx(0.25 * 2e-3, rel=1e-6)
    assert float(learning_rate(settings, 7)) == pytest.approx(2e-3, rel=1e-6)
    middle = 7 + (50 - 7) / 2
    assert float(learning_rate(settings, middle)) == pytest.approx(2e-3 * (0.25 + 0.75 * 0.5), rel=1e-5)


def test_ten_steps_are_torch_adamw_with_clipping():
    draw = np.random.default_rng(0)
    start = draw.normal(size=(5, 3)).astype(np.float32)
    gradients = draw.normal(size=(10, 5, 3)).astype(np.float32) * np.geomspace(0.01, 2, 10)[:, None, None]
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW(
        [parameter],
        lr=SETTINGS.learning_rate,
        betas=(SETTINGS.b1, SETTINGS.b2),
        eps=SETTINGS.eps,
        weight_decay=0.1,
    )
    schedule = transformers.get_cosine_schedule_with_warmup(
        theirs, SETTINGS.warmup_steps, SETTINGS.total_steps
    )
    params = {"a": jnp.asarray(start)}
    moments = optimizer(SETTINGS, 0.0).init(params)
    for step, gradient in enumerate(gradients):
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_([parameter], SETTINGS.clip_norm)
        theirs.step()
        schedule.step()
        rate = learning_rate(SETTINGS, step)
        updates, moments = optimizer(SETTINGS, rate).update(
            {"a": jnp.asarray(gradient, jnp.float32)}, moments, params
        )
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["a"], parameter.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_an_infinite_limit_clips_nothing():
    free = SETTINGS._replace(clip_norm=float("inf"), weight_decay=0.0)
    huge = {"a": jnp.full((3,), 1e6)}
    updates, _ = optimizer(free, 0.1).update(huge, optimizer(free, 0.1).init(huge), huge)
    reference = optax.adam(0.1, b1=0.9, b2=0.99)
    expected, _ = reference.update(huge, reference.init(huge))
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-6)


def test_decay_budget_is_what_decay_alone_does():
    weight = 1.0
    for step in range(50):
        weight *= 1.0 - float(learning_rate(SETTINGS, step)) * SETTINGS.weight_decay
    assert decay_budget(SETTINGS) == pytest.approx(1.0 - weight, rel=1e-3)


def test_settings_may_be_traced():
    """One compiled program serves every learning rate: what a sweep stands on."""
    compiled = jax.jit(lambda rate, step: learning_rate(SETTINGS._replace(learning_rate=rate), step))
    assert float(compiled(1.0, 7)) == pytest.approx(2.0 * float(compiled(0.5, 7)), rel=1e-6)
    assert compiled._cache_size() == 1

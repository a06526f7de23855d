"""AdamW with linear warmup and cosine decay, built from numbers that may be traced.

The settings are a pytree of scalars, so that one compiled step serves every learning rate, and a stack of adapters
can be trained with a different set each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Scalar = jax.Array | float


class OptimizerSettings(NamedTuple):
    """Numbers of the optimiser, all scalars, all allowed to be traced.

    Attributes:
        learning_rate: the peak, reached at the end of the warmup.
        warmup_steps: steps over which the rate rises from 0.
        total_steps: steps of the whole schedule, warmup included.
        final_fraction: the rate at the end as a fraction of the peak.
        weight_decay: decoupled; each step multiplies a parameter by (1 - rate * weight_decay).
        b1, b2, eps: Adam's.
        clip_norm: largest global gradient norm; infinity for no clipping.
        loraplus_lr_ratio: LoRA+'s ratio of b's learning rate to a's.
    """

    learning_rate: Scalar
    warmup_steps: Scalar
    total_steps: Scalar
    final_fraction: Scalar
    weight_decay: Scalar
    b1: Scalar
    b2: Scalar
    eps: Scalar
    clip_norm: Scalar
    loraplus_lr_ratio: Scalar = 1.0


def learning_rate(settings: OptimizerSettings, updates: Scalar) -> jax.Array:
    """The rate of the update that follows `updates` earlier steps.

    warmup:  peak * updates / max(1, warmup)
    after:   peak * (f + (1 - f) * max(0, (1 + cos(pi p)) / 2)),  p = (updates - warmup) / max(1, total - warmup)

    With f = `final_fraction` = 0 it is `transformers.get_cosine_schedule_with_warmup`; so the first update of a
    warmup has a rate of exactly zero. Past the end the rate stays at the final one.

    Args:
        settings: the schedule's numbers.
        updates: steps already made, from 0.
    Returns:
        float32 scalar.
    """
    count = jnp.asarray(updates, jnp.float32)
    warmup = jnp.asarray(settings.warmup_steps, jnp.float32)
    span = jnp.maximum(1.0, settings.total_steps - warmup)
    progress = jnp.clip((count - warmup) / span, 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    factor = jnp.where(
        count < warmup,
        count / jnp.maximum(1.0, warmup),
        settings.final_fraction + (1.0 - settings.final_fraction) * cosine,
    )
    return jnp.asarray(settings.learning_rate, jnp.float32) * factor


def decay_budget(settings: OptimizerSettings) -> float:
    """The share by which weight decay alone shrinks a parameter over a whole run: 1 - exp(-decay * sum of rates)."""
    steps = int(settings.total_steps)

    @jax.jit  # one small program, where every operation by itself would be compiled for this number of steps
    def budget(settings: OptimizerSettings) -> jax.Array:
        rates = jax.vmap(lambda step: learning_rate(settings, step))(jnp.arange(steps))
        return 1.0 - jnp.exp(-settings.weight_decay * jnp.sum(rates))

    return float(budget(settings))


def optimizer(settings: OptimizerSettings, rate: Scalar) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with decoupled weight decay on every leaf (a and b alike).

    Args:
        settings: the optimiser's numbers.
        rate: this step's learning rate (see `learning_rate`): an argument rather than a counter of its own, so that
            a skipped update leaves the schedule in step with the run.
    Source: Loshchilov and Hutter 2019, algorithm 2; Pascanu et al. 2013 (clipping); Hayou et al. 2024 (LoRA+).
    """

    def descend(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        with_b = getattr(path[-1], "key", "") in ("b", "m")  # as PEFT does, which counts DoRA's m to B
        return (-rate * settings.loraplus_lr_ratio if with_b else -rate) * update

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        optax.add_decayed_weights(settings.weight_decay),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(descend, updates)),
    )

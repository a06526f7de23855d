"""What changes while training: the adapter, the optimiser's moments, the step. Never the base."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.training.optimizer import OptimizerSettings, Scalar, optimizer
from jaxlora.training.spikes import Recent, no_steps


class Settings(NamedTuple):
    """The numbers of a run that the compiled step reads; traced, so that another value needs no other program.

    Attributes:
        optimizer: see `OptimizerSettings`.
        label_smoothing: s of the objective, in [0, 1).
        lora_scale: alpha/r or alpha/sqrt(r) of each target, by its name.
        lora_dropout: probability that an input element of each target's adapter is zeroed in training.
        spike_threshold: deviations above the recent median from which a step is a spike.
        skip_spikes: 1 where the update of a spike is not applied, 0 where it is.
    """

    optimizer: OptimizerSettings
    label_smoothing: Scalar
    lora_scale: Mapping[str, Scalar]
    lora_dropout: Mapping[str, Scalar]
    spike_threshold: Scalar = 6.0
    skip_spikes: Scalar = 0.0


class TrainState(NamedTuple):
    """Megabytes: what is donated to the step, saved and restored.

    Attributes:
        step: int32, optimiser steps made.
        adapter: unscaled a and b, with DoRA m; float32.
        anchor: what is taken off the adapter's products: PiSSA's start, {} for other adapters. Never changed.
        moments: the optimiser's state.
        key: uint32, the data of the run's random key; what a step draws is derived from it by name and step.
        settings: float32 scalars.
        recent: the losses and gradient norms that the next step is compared with.
    """

    step: jax.Array
    adapter: dict[str, Any]
    anchor: dict[str, Any]
    moments: Any
    key: jax.Array
    settings: Settings
    recent: Recent


def new_state(
    adapter: dict[str, Any],
    key: jax.Array,
    settings: Settings,
    anchor: dict[str, Any] | None = None,
    window: int = 32,
) -> TrainState:
    """The state before the first step, from an adapter, a random key, the run's numbers and the guard's window."""
    settings = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), settings)
    moments = optimizer(settings.optimizer, 0.0).init(adapter)
    return TrainState(
        jnp.zeros((), jnp.int32),
        adapter,
        anchor or {},
        moments,
        jax.random.key_data(key),
        settings,
        no_steps(window),
    )

"""The same training by jaxlora: same base, same batches, and the adapter that PEFT left at `lora.init_from`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.config.build import inputs, programs
from jaxlora.config.schema import Config
from jaxlora.core.compilation import compiler_options
from jaxlora.data.batches import Batches
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import resolve_model
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.step import make_train_step
from tests.parity.compared import Trained, flat


def jitted_step(decoder: Decoder) -> Callable[..., Any]:
    """The step as a run compiles it."""
    return jax.jit(make_train_step(decoder), donate_argnums=0, compiler_options=compiler_options("cpu"))


shared_step = functools.cache(jitted_step)
"""One step a decoder: cases that differ in numbers alone share a program."""


def train_by_jaxlora(
    config: Config,
    batches: Batches,
    make_step: Callable[[Decoder], Callable[..., Any]] = shared_step,
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda batch: batch,
) -> Trained:
    """The same training as a run makes it: first state, compiled step and placed batches from `config.build`.

    Args:
        config: what to do; the adapter at `lora.init_from` is what it starts from.
        batches: the batch of each step.
        make_step: `jitted_step`, where the program is not to be shared with others.
        change: applied to every batch, to plant a fault.
    """
    files = resolve_model(config.model.path)
    spec = DecoderSpec.from_hf(files.config)
    decoder = Decoder(spec, remat=config.model.remat, dtype=jnp.dtype(config.model.dtype))
    model = inputs.Model(files, spec, decoder, make_mesh((1, 1, 1), jax.devices()[:1]))
    base = inputs.base(model)
    given = programs.given_adapter(config, model)
    state = programs.first_state(config, model, config.train.max_steps, base, given)
    put = programs.put_batch(model, config.train.batch_size // config.train.micro_batch_size)
    step = make_step(decoder)
    start = flat(state.adapter)
    curves: dict[str, list[float]] = {"objective": [], "nll": [], "grad_norm": []}
    for number in range(1, config.train.max_steps + 1):
        state, sums = step(state, base, put(change(batches.batch(number))))
        assert float(sums.applied) == 1.0
        weight = float(sums.weight)
        curves["objective"].append(float(sums.objective) / weight)
        curves["nll"].append(float(sums.nll) / weight)
        curves["grad_norm"].append(float(sums.grad_norm))
    return Trained({name: np.array(values) for name, values in curves.items()}, start, flat(state.adapter))

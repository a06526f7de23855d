"""What a run computes with: the state before the first step, and the compiled steps."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.core.compilation import compiler_options
from jaxlora.core.errors import InputError
from jaxlora.core.prng import named
from jaxlora.lora import tree as lora
from jaxlora.lora.peft import load_peft
from jaxlora.lora.spec import LoraSpec, resolve_targets
from jaxlora.parallel import sharding
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, TrainState, new_state
from jaxlora.training.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled train and evaluation steps."""

    train: Callable[..., Any]
    evaluate: Callable[..., Any]


def lora_spec(config: Config) -> LoraSpec:
    """The adapter's constants."""
    chosen = config.lora
    return LoraSpec(
        chosen.rank, chosen.alpha, chosen.dropout, resolve_targets(chosen.targets), chosen.scaling
    )


def settings(config: Config, steps: int) -> Settings:
    """The numbers that the compiled step reads from its state."""
    chosen = config.optim
    return Settings(
        OptimizerSettings(
            learning_rate=chosen.learning_rate,
            warmup_steps=chosen.warmup_steps,
            total_steps=steps,
            final_fraction=chosen.final_fraction,
            weight_decay=chosen.weight_decay,
            b1=chosen.b1,
            b2=chosen.b2,
            eps=chosen.eps,
            clip_norm=chosen.clip_norm or math.inf,
        ),
        label_smoothing=chosen.label_smoothing,
        lora_scale=lora_spec(config).scale,
        lora_dropout=config.lora.dropout,
    )


def state_shapes(config: Config, model: Model, steps: int) -> TrainState:
    """The state's tree of placed `jax.ShapeDtypeStruct`s."""
    spec = lora_spec(config)
    adapter = lora.adapter_shapes(model.shapes(), spec.targets, spec.rank)
    shapes = jax.eval_shape(
        lambda a: new_state(a, jax.random.key(config.seed), settings(config, steps)), adapter
    )
    placed = sharding.state_shardings(model.mesh, shapes)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)


def first_state(config: Config, model: Model, steps: int) -> TrainState:
    """The state before the first step: a new adapter, or the one of lora.init_from.

    Raises:
        InputError: lora.init_from is no adapter for this base, or has another rank or other targets than the config.
    """
    spec, key = lora_spec(config), jax.random.key(config.seed)
    like = state_shapes(config, model, steps)
    given = None
    if config.lora.init_from:
        given, found = load_peft(config.lora.init_from, model.spec)
        for name, wanted, has in (("rank", spec.rank, found.rank), ("targets", spec.targets, found.targets)):
            if wanted != has:
                shown = ",".join(has) if isinstance(has, tuple) else has
                raise InputError(
                    f"lora.init_from {config.lora.init_from} has {name} {shown}, the config asks for "
                    f"{','.join(wanted) if isinstance(wanted, tuple) else wanted}; set --config.lora.{name}={shown}."
                )

    def make(given: Any) -> TrainState:
        adapter = (
            given
            if given is not None
            else lora.init(named(key, "adapter"), model.shapes(), spec.targets, spec.rank)
        )
        return new_state(adapter, named(key, "train"), settings(config, steps))

    return jax.jit(make, out_shardings=jax.tree.map(lambda s: s.sharding, like))(given)


def put_batch(
    model: Model, micro_batches: int | None = None
) -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
    """Places host batches: [rows, T] as they are, or cut into [M, rows / M, T]."""
    placement = sharding.batch_sharding(model.mesh, micro_batches is not None)

    def put(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        if micro_batches is not None:
            batch = {name: x.reshape(micro_batches, -1, *x.shape[1:]) for name, x in batch.items()}
        return jax.device_put(dict(batch), placement)

    return put


def compile_programs(config: Config, model: Model, like: TrainState) -> Programs:
    """Compiles the train and the evaluation step, before the first batch and once for all.

    Args:
        like: the state, or its shapes.
    """
    shapes, mesh = model.shapes(), model.mesh
    whole = NamedSharding(mesh, PartitionSpec())
    options = compiler_options(mesh.devices.flat[0].platform)

    def batch(*rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        placement = sharding.batch_sharding(mesh, len(rows) > 1)
        kinds = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {
            "weights": jnp.float32
        }
        return {
            name: jax.ShapeDtypeStruct((*rows, config.data.max_length), kind, sharding=placement)
            for name, kind in kinds.items()
        }

    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    micro = config.train.micro_batch_size
    step = make_train_step(model.decoder, dropout=config.lora.dropout > 0)
    placements = (jax.tree.map(lambda x: x.sharding, state), whole)
    lowered = (
        jax.jit(step, donate_argnums=0, out_shardings=placements).lower(
            state, shapes, batch(config.train.batch_size // micro, micro)
        ),
        jax.jit(make_eval_step(model.decoder)).lower(
            state.adapter, state.settings.lora_scale, shapes, batch(config.eval.batch_size)
        ),
    )
    with ThreadPoolExecutor(len(lowered)) as pool:  # XLA compiles outside Python's lock
        return Programs(*pool.map(lambda program: program.compile(compiler_options=options), lowered))

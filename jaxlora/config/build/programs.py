"""What a run computes with: the state before the first step, and the compiled steps."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.core.allocator import give_back
from jaxlora.core.compilation import compiler_options
from jaxlora.core.errors import InputError
from jaxlora.core.prng import named
from jaxlora.lora import variants
from jaxlora.lora.peft import load_peft
from jaxlora.lora.spec import LoraSpec, resolve_targets
from jaxlora.lora.tree import adapted_kernels
from jaxlora.models.decoder import Decoder
from jaxlora.parallel import sharding
from jaxlora.parallel.rows import Share
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, TrainState, new_state
from jaxlora.training.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run.

    Attributes:
        train: `step(state, base, batch) -> (state, sums)`; the state is donated.
        effective: `(state, base) -> lora`, the adapter as the decoder reads it.
        evaluate: `(lora, base, batch) -> TokenMetrics`.
    """

    train: Callable[..., Any]
    effective: Callable[..., Any]
    evaluate: Callable[..., Any]


def lora_spec(config: Config) -> LoraSpec:
    """The adapter's constants."""
    chosen = config.lora
    return LoraSpec(
        chosen.rank,
        chosen.alpha,
        chosen.dropout,
        resolve_targets(chosen.targets),
        chosen.scaling,
        chosen.use_dora,
        chosen.rank_pattern,
        chosen.dropout_pattern,
    )


def settings(config: Config, steps: int) -> Settings:
    """The numbers that the compiled step reads from its state."""
    chosen, spec = config.optim, lora_spec(config)
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
            loraplus_lr_ratio=chosen.loraplus_lr_ratio,
        ),
        label_smoothing=chosen.label_smoothing,
        lora_scale=spec.scales,
        lora_dropout=spec.dropouts,
        spike_threshold=config.guard.threshold,
        skip_spikes=float(config.guard.on_spike != "log"),
    )


def state_shapes(config: Config, model: Model, steps: int) -> TrainState:
    """The state's tree of placed `jax.ShapeDtypeStruct`s."""
    spec, base, key = lora_spec(config), model.shapes(), jax.random.key(config.seed)

    def make(base: Any) -> TrainState:
        adapter, anchor = variants.start(key, base, spec, config.lora.init)
        return new_state(adapter, key, settings(config, steps), anchor, config.guard.window)

    shapes = jax.eval_shape(make, base)
    placed = sharding.state_shardings(model.mesh, shapes)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)


def given_adapter(config: Config, model: Model) -> dict[str, Any] | None:
    """The adapter of lora.init_from, None where there is none; refuses a start that is not possible.

    Raises:
        InputError: lora.init_from is no adapter for this base, or another one than the config describes; or a rank is
            more than PiSSA can give.
    """
    spec, chosen = lora_spec(config), config.lora
    if not chosen.init_from:
        if chosen.init.startswith("pissa"):
            for path, kernel in adapted_kernels(model.shapes(), spec.targets).items():
                rank, largest = spec.ranks[path[-1]], min(kernel.shape[1:])
                if rank > largest:
                    raise InputError(
                        f"lora.init = {chosen.init} with rank {rank}: {path[-1]} {list(kernel.shape[1:])} has only "
                        f"{largest} singular vectors; set --config.lora.rank={largest} or less."
                    )
        return None
    if chosen.init != "kaiming" or chosen.rank_pattern:
        key = "rank_pattern" if chosen.rank_pattern else "init"
        raise InputError(
            f"lora.init_from starts from an adapter that is there, and lora.{key} = {getattr(chosen, key)!r} asks for "
            "another one: leave one of them out."
        )
    adapter, found = load_peft(chosen.init_from, model.spec)
    for name in ("rank", "targets", "use_dora", "scaling", "alpha"):
        wanted, has = getattr(spec, name), getattr(found, name)
        if wanted != has:
            told = [",".join(value) if isinstance(value, tuple) else value for value in (has, wanted)]
            raise InputError(
                f"lora.init_from {chosen.init_from} has {name} {told[0]}, the config asks for {told[1]}; set "
                f"--config.lora.{name}={told[0]}."
            )
    return adapter


class Starter:
    """Makes states of before the first step, by one program for all configs whose states are alike.

    Args:
        model: the base. base: its parameters; PiSSA and DoRA start from them.
    """

    def __init__(self, model: Model, base: Mapping[str, Any]):
        self._model, self._base = model, base
        self._programs: dict[Any, Callable[..., TrainState]] = {}

    def __call__(self, config: Config, steps: int, given: Mapping[str, Any] | None = None) -> TrainState:
        """The state of a run of so many steps.

        Args:
            given: the adapter to start from, by `given_adapter`; None for a new one.
        """
        spec, init, window = lora_spec(config), config.lora.init, config.guard.window

        def start(
            base: Mapping[str, Any], given: Mapping[str, Any] | None, seed: jax.Array, numbers: Settings
        ) -> TrainState:
            key, adapter, anchor = jax.random.key(seed), given, {}
            if adapter is None:
                adapter, anchor = variants.start(named(key, "adapter"), base, spec, init)
            return new_state(dict(adapter), named(key, "train"), numbers, anchor, window)

        # PiSSA alone reads the scales, which are no arguments.
        alike = (tuple(spec.ranks.items()), spec.use_dora, init, window, given is None)
        alike += tuple(spec.scales.items()) if init.startswith("pissa") else ()
        if alike not in self._programs:
            placements = jax.tree.map(lambda s: s.sharding, state_shapes(config, self._model, steps))
            options = compiler_options(self._model.mesh.devices.flat[0].platform, once=True)
            self._programs[alike] = jax.jit(start, out_shardings=placements, compiler_options=options)
        return self._programs[alike](self._base, given, np.int32(config.seed), settings(config, steps))


def first_state(
    config: Config,
    model: Model,
    steps: int,
    base: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step of one run; arguments as of `Starter`."""
    state = Starter(model, base)(config, steps, given)
    give_back()  # what loading the base and making this left, before the steps take theirs
    return state


def effective_adapter(state: TrainState, base: Mapping[str, Any]) -> dict[str, Any]:
    """A state's adapter as the decoder reads it."""
    return variants.effective(base, state.adapter, state.settings.lora_scale, state.anchor)


def put_batch(
    model: Model, micro_batches: int | None = None
) -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
    """Places this process's rows of host batches (see `Share`): [rows, T] as they are, or cut into [M, rows / M, T]."""
    share = Share(model.mesh)
    return lambda batch: share.put(batch, micro_batches)


def compile_programs(config: Config, model: Model, like: TrainState) -> Programs:
    """Compiles what a run computes with, before the first batch and once for all.

    Args:
        like: the state, or its shapes.
    """
    lora = lora_shapes(model, like)
    lowered = (
        lower_train(config, model, like),
        lower_effective(model, like, lora),
        lower_evaluation(config, model, lora),
    )
    return Programs(*compile_all(model, lowered))  # pyright: ignore[reportArgumentType]  one that is None fails at once


def lora_shapes(model: Model, state: TrainState) -> dict[str, Any]:
    """A state's adapter as the decoder reads it: its tree of placed `jax.ShapeDtypeStruct`s."""
    lora = jax.eval_shape(effective_adapter, _shapes(state), model.shapes())
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        lora,
        sharding.tree_shardings(model.mesh, lora),
    )


def lower_train(config: Config, model: Model, like: TrainState) -> jax.stages.Lowered:
    """`step(state, base, batch) -> (state, sums)`, ready to be compiled; the state is donated."""
    state, mesh, micro = _shapes(like), model.mesh, config.train.micro_batch_size
    step = make_train_step(training_decoder(config, model), dropout=any(lora_spec(config).dropouts.values()))
    placements = (jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, PartitionSpec()))
    batch = batch_shapes(config, mesh, config.train.batch_size // micro, micro)
    return jax.jit(step, donate_argnums=0, out_shardings=placements).lower(state, model.shapes(), batch)


def training_decoder(config: Config, model: Model) -> Decoder:
    """The decoder as it is trained: a model.remat that is not "auto" goes before its own."""
    decoder = model.decoder.clone(scanned=config.model.scan_layers)
    return decoder if config.model.remat == "auto" else decoder.clone(remat=config.model.remat)


def lower_effective(model: Model, like: TrainState, lora: Mapping[str, Any]) -> jax.stages.Lowered:
    """`(state, base) -> lora`, ready to be compiled; `lora` is from `lora_shapes`."""
    placements = jax.tree.map(lambda x: x.sharding, lora)
    return jax.jit(effective_adapter, out_shardings=placements).lower(_shapes(like), model.shapes())


def lower_evaluation(config: Config, model: Model, lora: Mapping[str, Any]) -> jax.stages.Lowered:
    """`(lora, base, batch) -> TokenMetrics` for batches of eval.batch_size rows, ready to be compiled.

    Args:
        lora: the adapter as the decoder reads it, or its placed shapes; {} for the bare base.
    """
    batch = batch_shapes(config, model.mesh, config.eval.batch_size)
    rows = sharding.batch_sharding(model.mesh, micro_batches=False)
    return jax.jit(make_eval_step(model.decoder), out_shardings=rows).lower(lora, model.shapes(), batch)


def compile_all(model: Model, lowered: Sequence[jax.stages.Lowered]) -> list[jax.stages.Compiled | None]:
    """Compiles several programs at once, with the options of the platform.

    Returns:
        A program each, None where the compiler found no way to place it: some compile only what fits the device.
    """
    options: dict[str, str | bool] = {**compiler_options(model.mesh.devices.flat[0].platform)}

    def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled | None:
        try:
            return program.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None

    with ThreadPoolExecutor(len(lowered)) as pool:  # XLA compiles outside Python's lock
        made = list(pool.map(compiled, lowered))
    give_back()
    return made


def _shapes(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def batch_shapes(config: Config, mesh: Mesh, *rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's placed shapes [*rows, T]."""
    placement = sharding.batch_sharding(mesh, len(rows) > 1)
    kinds = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {
        "weights": jnp.float32
    }
    return {
        name: jax.ShapeDtypeStruct((*rows, config.data.max_length), kind, sharding=placement)
        for name, kind in kinds.items()
    }

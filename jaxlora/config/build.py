"""The composition root: from a checked config to live objects. Everything is put together here, and nowhere else."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.config.schema import Config
from jaxlora.core.compilation import compiler_options
from jaxlora.core.errors import InputError
from jaxlora.core.prng import named
from jaxlora.core.tree import unflatten
from jaxlora.data.batches import Batches, EvalBatches, Examples, prepare
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.data.sources import Source, load_conversations, split_off_eval
from jaxlora.lora import tree as lora
from jaxlora.lora.peft import load_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import ModelFiles, load_params, param_shapes, resolve_model
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, TrainState, new_state
from jaxlora.training.step import make_eval_step, make_train_step

Counter = Callable[[int, int], None]
"""Progress of something long: (done, total)."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A base that has been looked at but not loaded.

    Attributes:
        files: where it lies. spec: its numbers. decoder: the function. mesh: the devices it will live on.
    """

    files: ModelFiles
    spec: DecoderSpec
    decoder: Decoder
    mesh: Mesh

    def shapes(self) -> dict[str, Any]:
        """The base's tree of placed `jax.ShapeDtypeStruct`s: enough to compile with."""
        return unflatten(
            {
                path: jax.ShapeDtypeStruct(
                    shape, self.decoder.dtype, sharding=sharding.parameter_sharding(self.mesh, path, shape)
                )
                for path, shape in param_shapes(self.spec).items()
            }
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and held-out data, encoded and laid out.

    Attributes:
        train, eval: batches. train_source, eval_source: the conversations they come from.
        encoder: template and tokenizer.
    """

    train: Batches
    eval: EvalBatches
    train_source: Source
    eval_source: Source
    encoder: ChatEncoder

    def fingerprint(self) -> dict[str, str]:
        """What identifies the conversations, for the record."""
        return {"train": self.train_source.fingerprint, "eval": self.eval_source.fingerprint}


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled train and evaluation steps."""

    train: Callable[..., Any]
    evaluate: Callable[..., Any]


# ---- model ----------------------------------------------------------------------------------------------------


def model(config: Config, weights: bool = True) -> Model:
    """Finds the base, reads its config, and lays out the mesh; loads no weights.

    Raises:
        InputError: no such model, one that the decoder cannot compute, a mesh that does not fit the devices, or rows
            longer than the model's positions.
    """
    mesh = make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor), jax.devices())
    files = resolve_model(config.model.path, config.model.revision, weights=weights)
    spec = DecoderSpec.from_hf(files.config)
    if config.data.max_length > spec.max_position_embeddings:
        raise InputError(
            f"data.max_length = {config.data.max_length}, but {config.model.path} was made for at most "
            f"{spec.max_position_embeddings} positions; set --config.data.max_length={spec.max_position_embeddings} "
            "or less."
        )
    for key, rows in (
        ("train.micro_batch_size", config.train.micro_batch_size),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if rows % sharding.row_devices(mesh):
            shares = sharding.row_devices(mesh)
            raise InputError(
                f"{key} = {rows} cannot be shared out evenly over {shares} devices (mesh.data x mesh.fsdp); "
                f"set it to a multiple of {shares}, such as --config.{key}={shares * max(1, round(rows / shares))}."
            )
    decoder = Decoder(
        spec,
        remat=config.model.remat,
        dtype=jnp.dtype(config.model.dtype),
        activation_sharding=sharding.activation_sharding(mesh) if mesh.size > 1 else None,
    )
    return Model(files, spec, decoder, mesh)


def base(model: Model, progress: Counter | None = None) -> dict[str, Any]:
    """Loads the frozen base onto the mesh."""

    def place(path: str, shape: tuple[int, ...], dtype: Any) -> NamedSharding:
        return sharding.parameter_sharding(model.mesh, tuple(path.split("/")), shape)

    return load_params(model.files, model.spec, model.decoder.dtype, place, progress)


def encoder(model: Model, train_on: str = "assistant") -> ChatEncoder:
    """The model's own tokenizer and chat template."""
    return ChatEncoder(load_tokenizer(str(model.files.folder)), train_on=train_on)


# ---- data -----------------------------------------------------------------------------------------------------


def data(
    config: Config, encoder: ChatEncoder, say: Callable[[str], None], progress: Counter | None = None
) -> Data:
    """Reads, encodes and lays out both data sets; says what was found, cut and dropped.

    Args:
        config: its `data`, `train`, `eval` and `seed`.
        encoder: of the model.
        say: takes a line for the person.
        progress: conversations encoded.
    """
    chosen = config.data
    train = load_conversations(chosen.train, chosen.train_split)
    say(train.description)
    if chosen.eval:
        held_out = load_conversations(chosen.eval, chosen.eval_split)
        say(held_out.description)
    else:
        train, held_out = split_off_eval(train, chosen.eval_fraction, config.seed)
        say(
            f"{len(held_out):,} of them are held out to evaluate on (data.eval_fraction {chosen.eval_fraction:g})"
        )

    def encoded(source: Source) -> Examples:
        examples = prepare(source, encoder, chosen.max_length, progress=progress)
        for line in examples.describe():
            say(line)
        return examples

    eval_examples = encoded(held_out)
    if config.eval.max_examples:
        eval_examples = eval_examples.first(config.eval.max_examples)
    return Data(
        Batches(
            encoded(train),
            config.train.batch_size,
            chosen.max_length,
            seed=config.seed,
            shuffle=chosen.shuffle,
            packing=chosen.packing,
        ),
        EvalBatches(eval_examples, config.eval.batch_size, chosen.max_length, packing=chosen.packing),
        train,
        held_out,
        encoder,
    )


def total_steps(config: Config, batches: Batches) -> int:
    """The run's optimiser steps, from train.max_steps or the epochs.

    Raises:
        InputError: the warmup would not end within them.
    """
    steps = config.train.max_steps or math.ceil(config.train.epochs * batches.steps_per_epoch)
    if config.optim.warmup_steps >= steps:
        raise InputError(
            f"optim.warmup_steps = {config.optim.warmup_steps}, but the run has {steps} steps "
            f"({config.train.epochs:g} epochs of {batches.steps_per_epoch}): it would never reach its learning rate.\n"
            f"Set it lower, for example --config.optim.warmup_steps={steps // 10}, or train for longer."
        )
    return steps


# ---- adapter, state, programs ---------------------------------------------------------------------------------


def lora_spec(config: Config) -> LoraSpec:
    """The adapter's constants."""
    chosen = config.lora
    return LoraSpec(chosen.rank, chosen.alpha, chosen.dropout, chosen.targets, chosen.scaling)  # type: ignore[arg-type]


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
    train = jax.jit(
        step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), whole)
    ).lower(state, shapes, batch(config.train.batch_size // micro, micro))
    evaluate = jax.jit(make_eval_step(model.decoder)).lower(
        state.adapter, state.settings.lora_scale, shapes, batch(config.eval.batch_size)
    )
    return Programs(train.compile(compiler_options=options), evaluate.compile(compiler_options=options))


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on, for the record."""
    import jaxlora

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
    return {"jaxlora": jaxlora.__version__} | {name: importlib.metadata.version(name) for name in names}

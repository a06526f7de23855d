"""What a run is given: the base and the data, found, checked and laid out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlora.config.schema import Config, ModelConfig
from jaxlora.core.errors import InputError, LayoutError
from jaxlora.core.quantised import BLOCK, SMALLEST_BLOCK, Quantised, block_of
from jaxlora.core.tree import Path, map_leaves, unflatten
from jaxlora.data.batches import Batches, EvalBatches, Examples, prepare
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.data.packing import most_in_a_row
from jaxlora.data.sources import Source, load_conversations, split_off_eval
from jaxlora.models.attention import Attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.kernels import packed_is_there
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import (
    AXES,
    ModelFiles,
    kept_in,
    load_params,
    param_likes,
    param_shapes,
    resolve_model,
)
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh

Counter = Callable[[int, int], None]
"""Progress of something long: (done, total)."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A base that has been looked at but not loaded.

    Attributes:
        files: where it lies. spec: its numbers. decoder: the function. mesh: the devices it will live on.
        quantize, quantize_embeddings: what its kernels and its tables are kept in, as in a config's `model`.
    """

    files: ModelFiles
    spec: DecoderSpec
    decoder: Decoder
    mesh: Mesh
    quantize: str = "none"
    quantize_embeddings: str = "none"

    def shapes(self) -> dict[str, Any]:
        """The base's tree of placed `jax.ShapeDtypeStruct`s: enough to compile with."""
        placed = {}
        likes = param_likes(self.spec, self.decoder.dtype, self.quantize, self.quantize_embeddings)
        for path, leaf in likes.items():
            place = self.place(path, leaf.shape)
            placed[path] = jax.tree.map(
                lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), leaf
            )
        return map_leaves(self.told, unflatten(placed))

    def place(self, path: Path, shape: tuple[int, ...]) -> NamedSharding:
        """Where a leaf of the base lives; the shape of a quantised one is that of what it stands for."""
        if kept_in(path, self.quantize, self.quantize_embeddings) == "none":
            return sharding.parameter_sharding(self.mesh, path, shape)
        axis = AXES[path[-1]]
        return sharding.parameter_sharding(self.mesh, path, shape, block_of(shape[axis]), axis)

    def told(self, path: Path, leaf: Any) -> Any:
        """A leaf of the base; a quantised kernel that is cut over `fsdp` is told where its layers are put together."""
        if not isinstance(leaf, Quantised) or path[-1] != "kernel" or self.mesh.shape["fsdp"] == 1:
            return leaf
        return dataclasses.replace(leaf, together=sharding.layer_together(self.mesh, path))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out data, encoded and laid out.

    Attributes:
        eval: batches. eval_source: the conversations they come from.
        encoder: template and tokenizer.
    """

    eval: EvalBatches
    eval_source: Source
    encoder: ChatEncoder


@dataclasses.dataclass(frozen=True)
class Data(HeldOut):
    """Held-out data and training data.

    Attributes:
        train: batches. train_source: the conversations they come from.
    """

    train: Batches
    train_source: Source


# ---- model ----------------------------------------------------------------------------------------------------


def model(config: Config, weights: bool = True, devices: Sequence[Any] | None = None) -> Model:
    """Finds the base, reads its config, and lays out the mesh; loads no weights.

    Args:
        weights: whether they have to be there.
        devices: of the mesh; None for those at hand.
    Raises:
        InputError: no such model, one that the decoder cannot compute, a mesh that does not fit the devices, rows
            longer than the model's positions, or a model.remat or model.scan_layers that the devices cannot have.
    """
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh = make_mesh(sizes, jax.devices() if devices is None else devices, config.mesh.trial)
    if config.model.remat == "offload" and not offloads(mesh):
        raise InputError(
            "model.remat = 'offload' keeps what layers are given in the host's memory, which is a CPU's own: it would "
            "save nothing here.\nSet --config.model.remat=full."
        )
    if not config.model.scan_layers and mesh.size > 1:
        raise InputError(
            "model.scan_layers = False writes layers out, and nothing would keep their kernels from being put together "
            f"all at once on each of the mesh's {mesh.size} devices.\nSet --config.model.scan_layers=true, or "
            "show the run one of them (CUDA_VISIBLE_DEVICES=0)."
        )
    found = find(config.model, mesh, weights)
    check_positions(config, found.spec.max_position_embeddings)
    check_rows("train.micro_batch_size", config.train.micro_batch_size, mesh)
    check_rows("eval.batch_size", config.eval.batch_size, mesh)
    return found


def find(chosen: ModelConfig, mesh: Mesh, weights: bool = True) -> Model:
    """Finds a base and reads its config; loads no weights, and knows nothing of the rows it will be given.

    Raises:
        InputError: no such model, one that the decoder cannot compute, or an attention that the devices cannot.
    """
    files = resolve_model(chosen.path, chosen.revision, weights=weights)
    spec = DecoderSpec.from_hf(files.config)
    check_blocks(spec, chosen.quantize, chosen.quantize_embeddings)
    decoder = Decoder(
        spec,
        remat="full" if chosen.remat == "auto" else chosen.remat,  # until `memory.fit` knows what fits
        dtype=jnp.dtype(chosen.dtype),
        activation_sharding=sharding.activation_sharding(mesh) if mesh.size > 1 else None,
        attention=attention(chosen, spec, mesh),
    )
    return Model(files, spec, decoder, mesh, chosen.quantize, chosen.quantize_embeddings)


def check_blocks(spec: DecoderSpec, quantize: str, quantize_embeddings: str = "none") -> None:
    """Raises InputError when kernels or words have too few numbers, or an odd number, to be quantised in blocks."""
    for path, shape in param_shapes(spec).items():
        kind = kept_in(path, quantize, quantize_embeddings)
        if kind == "none" or block_of(shape[AXES[path[-1]]]) >= SMALLEST_BLOCK:
            continue
        key, blocks = {
            "kernel": ("model.quantize", f"kernels in blocks of {BLOCK} inputs"),
            "embedding": ("model.quantize_embeddings", f"words in blocks of {BLOCK} numbers"),
        }[path[-1]]
        raise InputError(
            f"{key} = {kind!r} takes {blocks}, or {SMALLEST_BLOCK} at the least, and {path[-2]} has "
            f"{shape[AXES[path[-1]]]}.\nOf this model it can only be 'none'."
        )


def offloads(mesh: Mesh) -> bool:
    """Whether these devices have a memory of their own, beside the host's."""
    return mesh.devices.flat[0].platform != "cpu"


def on_gpus(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "gpu"


def attention(chosen: ModelConfig, spec: DecoderSpec, mesh: Mesh) -> Attention:
    """How a base attends on these devices.

    Raises:
        InputError: model.attention is a kind that they, or this base, cannot be served with.
    """
    found = Attention(
        chosen.attention,
        attention_platform(mesh.devices.flat[0]),
        sharding.attention_sharding(mesh) if mesh.size > 1 else None,
    )
    refusal = found.refusal(spec.head_dim, chosen.dtype)
    if refusal:
        raise InputError(
            f"model.attention = {chosen.attention!r} {refusal}.\n"
            "Set --config.model.attention=auto, which takes what the devices have."
        )
    return found


MOST_STRETCHES = 32
"""The most stretches of a row that cuDNN is told of: its statistics of a row take T numbers for each of them."""


def knowing_rows(model: Model, config: Config, *examples: Examples) -> Model:
    """The model, its attention told how many examples a row of these has at most, or a row of any of them.

    What it computes is the same. A sliding window needs cuDNN's mask.
    """
    lengths = np.concatenate([each.lengths for each in examples])
    most = most_in_a_row(lengths, config.data.max_length, packing=config.data.packing)
    if model.spec.sliding_window is not None:
        return model
    how = told(model.decoder.attention, model.mesh.devices.flat[0], most)
    return dataclasses.replace(model, decoder=model.decoder.clone(attention=how))


def told(how: Attention, device: Any, examples: int) -> Attention:
    """Attention that knows of at most so many examples a row, where the device can make something of it."""
    stretches = examples + 1  # the padding behind them
    if stretches > MOST_STRETCHES or not (by_example(device) and packed_is_there()):
        return how
    return dataclasses.replace(how, stretches=stretches)


def by_example(device: Any) -> bool:
    """Whether cuDNN's attention there takes a row's examples one by one: Hopper, where that was seen."""
    return attention_platform(device) == "cuda" and 9 <= float(device.compute_capability) < 10


def attention_platform(device: Any) -> str:
    """ "cpu", "tpu", "gpu", or "cuda" for a GPU that cuDNN's flash attention runs on: compute capability 8 and up."""
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's have names
        capability = 0.0
    return "cuda" if device.platform == "gpu" and capability >= 8 else device.platform


def check_positions(config: Config, positions: int) -> None:
    """Raises a LayoutError when rows would be longer than what the base was made for."""
    if config.data.max_length > positions:
        raise LayoutError(
            f"data.max_length = {config.data.max_length}, but {config.model.path} was made for at most "
            f"{positions} positions; set --config.data.max_length={positions} or less."
        )


def check_rows(key: str, rows: int, mesh: Mesh) -> None:
    """Raises InputError when the rows of a batch, as many as the config's `key` says, do not divide over the mesh."""
    shares = sharding.row_devices(mesh)
    if rows % shares:
        raise InputError(
            f"{key} = {rows} cannot be shared out evenly over {shares} devices (mesh.data x mesh.fsdp); "
            f"set it to a multiple of {shares}, such as --config.{key}={shares * max(1, round(rows / shares))}."
        )


def base(model: Model, progress: Counter | None = None) -> dict[str, Any]:
    """Loads the frozen base onto the mesh."""

    def place(path: str, shape: tuple[int, ...], dtype: Any) -> NamedSharding:
        return model.place(tuple(path.split("/")), shape)

    kept = model.decoder.dtype, place, progress, model.quantize, model.quantize_embeddings
    return map_leaves(model.told, load_params(model.files, model.spec, *kept))


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
    train, source = _sources(config, say)
    batches = _eval_batches(config, source, encoder, say, progress)
    return Data(
        batches,
        source,
        encoder,
        Batches(
            _encoded(config, train, encoder, say, progress),
            config.train.batch_size,
            chosen.max_length,
            seed=config.seed,
            shuffle=chosen.shuffle,
            packing=chosen.packing,
        ),
        train,
    )


def held_out(
    config: Config, encoder: ChatEncoder, say: Callable[[str], None], progress: Counter | None = None
) -> HeldOut:
    """The held-out part of `data` alone: the same rows, in the same batches."""
    source = _eval_source(config, say) if config.data.eval else _sources(config, say)[1]
    return HeldOut(_eval_batches(config, source, encoder, say, progress), source, encoder)


def _sources(config: Config, say: Callable[[str], None]) -> tuple[Source, Source]:
    """The conversations to train on, and those to evaluate on."""
    chosen = config.data
    train = load_conversations(chosen.train, chosen.train_split)
    say(train.description)
    if chosen.eval:
        return train, _eval_source(config, say)
    train, source = split_off_eval(train, chosen.eval_fraction, config.seed)
    say(f"{len(source):,} of them are held out to evaluate on (data.eval_fraction {chosen.eval_fraction:g})")
    return train, source


def _eval_source(config: Config, say: Callable[[str], None]) -> Source:
    source = load_conversations(config.data.eval, config.data.eval_split)
    say(source.description)
    return source


def _eval_batches(
    config: Config, source: Source, encoder: ChatEncoder, say: Callable[[str], None], progress: Counter | None
) -> EvalBatches:
    examples = _encoded(config, source, encoder, say, progress)
    if config.eval.max_examples:
        examples = examples.first(config.eval.max_examples)
    return EvalBatches(examples, config.eval.batch_size, config.data.max_length, packing=config.data.packing)


def _encoded(
    config: Config, source: Source, encoder: ChatEncoder, say: Callable[[str], None], progress: Counter | None
) -> Examples:
    examples = prepare(source, encoder, config.data.max_length, progress=progress)
    for line in examples.describe():
        say(line)
    return examples


def total_steps(config: Config, batches: Batches) -> int:
    """The run's optimiser steps, from train.max_steps or the epochs.

    Raises:
        LayoutError: the warmup would not end within them.
    """
    steps = config.train.max_steps or math.ceil(config.train.epochs * batches.steps_per_epoch)
    if config.optim.warmup_steps >= steps:
        raise LayoutError(
            f"optim.warmup_steps = {config.optim.warmup_steps}, but the run has {steps} steps "
            f"({config.train.epochs:g} epochs of {batches.steps_per_epoch}): it would never reach its learning rate.\n"
            f"Set it lower, for example --config.optim.warmup_steps={steps // 10}, or train for longer."
        )
    return steps

"""Base weights: from a Hugging Face folder's safetensors, slice by slice, into stacked and sharded arrays."""

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.errors import InputError
from jaxlora.core.quantised import KERNEL, KINDS, TABLE, Quantised, like, quantise
from jaxlora.core.tree import Path as TreePath
from jaxlora.core.tree import unflatten
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.tensors import Part, Tensors, read_json, weight_files

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)
# "model*" leaves out consolidated.safetensors, a second copy of the weights in Mistral's repositories.
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
_READERS = 4  # threads: enough to hide a network disk's latency; the page cache is saturated by two
_TABLE_PIECE = (
    2**20
)  # values of a table that one of them quantises at a time: 2 MiB in bfloat16, 4 MiB in float32

Place = Callable[[str, tuple[int, ...], Any], jax.sharding.Sharding | None]
"""(path joined by "/", shape, dtype) -> where that leaf lives; None for the default device. A quantised leaf is asked
for by its own shape, and placed in whole blocks."""

AXES = {"kernel": KERNEL, "embedding": TABLE}
"""By the last name of their paths: the leaves that may be quantised, and the axis of their blocks."""


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on this machine.

    Attributes:
        name: what the person gave as model.path.
        revision: the commit that was downloaded; "" for a local folder.
        folder: holds config.json, and the weights and tokenizer if those were asked for or are there.
        config: the parsed config.json.
    """

    name: str
    revision: str
    folder: Path
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """How Hugging Face stores one leaf: under which names, and which way round.

    Attributes:
        name: the tensor's name; of a stacked leaf, with {} for the layer's number.
        shape: of our leaf; a stacked one begins with L.
        transposed: whether a stored matrix is [out, in] where ours is [in, out].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def names(self) -> list[str]:
        """One name for each layer, or the one name."""
        return [self.name.format(layer) for layer in range(self.shape[0])] if self.stacked else [self.name]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each of the tensors called `names`."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def tensor_table(spec: DecoderSpec) -> dict[TreePath, Stored]:
    """The one table of our paths and Hugging Face's names, for reading and for writing."""
    layers, width, wide = spec.num_layers, spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    kernels = {
        ("self_attn", "q_proj"): (width, queries),
        ("self_attn", "k_proj"): (width, keys),
        ("self_attn", "v_proj"): (width, keys),
        ("self_attn", "o_proj"): (queries, width),
        ("mlp", "gate_proj"): (width, wide),
        ("mlp", "up_proj"): (width, wide),
        ("mlp", "down_proj"): (wide, width),
    }
    table: dict[TreePath, Stored] = {
        ("embed_tokens", "embedding"): Stored("model.embed_tokens.weight", (spec.vocab_size, width)),
        ("norm", "scale"): Stored("model.norm.weight", (width,)),
    }
    if not spec.tie_word_embeddings:
        table["lm_head", "embedding"] = Stored("lm_head.weight", (spec.vocab_size, width))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table["layers", norm, "scale"] = Stored(f"model.layers.{{}}.{norm}.weight", (layers, width))
    for (block, name), shape in kernels.items():
        module = f"model.layers.{{}}.{block}.{name}"
        table["layers", block, name, "kernel"] = Stored(f"{module}.weight", (layers, *shape), transposed=True)
        if spec.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
            table["layers", block, name, "bias"] = Stored(f"{module}.bias", (layers, shape[1]))
    return table


def param_shapes(spec: DecoderSpec) -> dict[TreePath, tuple[int, ...]]:
    """The shape of every leaf of the base parameters, by path."""
    return {path: stored.shape for path, stored in tensor_table(spec).items()}


def kept_in(path: TreePath, quantize: str, quantize_embeddings: str) -> str:
    """What a leaf of the base is kept in: "none", or one of `KINDS`.

    Args:
        path: of the leaf.
        quantize: of all kernels. quantize_embeddings: of embedding and head. Norms and biases are never quantised.
    """
    return {"kernel": quantize, "embedding": quantize_embeddings}.get(path[-1], "none")


def param_likes(
    spec: DecoderSpec, dtype: Any, quantize: str = "none", quantize_embeddings: str = "none"
) -> dict[TreePath, Any]:
    """Every leaf of the base parameters, by path, as a `jax.ShapeDtypeStruct` or a `Quantised` of two.

    Args:
        spec: of the base.
        dtype: of all leaves, or of what the quantised ones stand for.
        quantize, quantize_embeddings: see `kept_in`.
    """
    return {
        path: _like(path, shape, dtype, kept_in(path, quantize, quantize_embeddings))
        for path, shape in param_shapes(spec).items()
    }


def _like(path: TreePath, shape: tuple[int, ...], dtype: Any, kind: str) -> Any:
    if kind in KINDS:
        return like(shape, dtype, kind, AXES[path[-1]])
    return jax.ShapeDtypeStruct(shape, dtype)


def resolve_model(path: str, revision: str = "", *, weights: bool = True) -> ModelFiles:
    """Finds a model's folder: a local one, or one from the Hugging Face hub, downloaded as far as it is not cached.

    An interrupted download goes on where it stopped. Only the config, the tokenizer and the safetensors are fetched.

    Args:
        path: a local folder, or a hub id such as "Qwen/Qwen2.5-0.5B-Instruct".
        revision: branch, tag or commit on the hub; "" for the default branch. Not used for a local folder.
        weights: whether the weights are needed; without them a hub model costs a few megabytes, and a local folder
            may lack them.
    Returns:
        The folder and its config.
    Raises:
        InputError: no such folder or repository, no config.json, no safetensors, or no network and not cached.
    """
    local = Path(path).expanduser()
    if path and local.is_dir():
        folder, commit = local, ""
    elif local.is_file():
        raise InputError(
            f"model.path {path!r} is a file; it must be a folder with config.json and safetensors."
        )
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise InputError(
            f"model.path {path!r} does not exist; it must be a local folder or a hub id (owner/name)."
        )
    else:
        folder = _download(path, revision, weights)
        commit = folder.name
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None:
        remedy = "it must be a model folder in Hugging Face's format."
        if (folder / "adapter_config.json").is_file():
            remedy = "it is a PEFT adapter: give its base as model.path and this folder as lora.init_from."
        raise InputError(f"model.path {path!r} has no config.json; {remedy}")
    if weights:
        weight_files(folder)
    return ModelFiles(path, commit, folder, config)


def load_params(
    files: ModelFiles,
    spec: DecoderSpec,
    dtype: Any = "bfloat16",
    place: Place | None = None,
    progress: Callable[[int, int], None] | None = None,
    quantize: str = "none",
    quantize_embeddings: str = "none",
) -> dict[str, Any]:
    """Reads the base parameters; each device's part of each leaf is put together from slices of the stored tensors.

    On the host there is at no time more than one part of one leaf (and the tensors that the readers hold) beside what
    has been placed; on a CPU the placed array is the very memory that was read into. A kernel is quantised as it is
    read, one layer's part at a time, and a table some rows at a time, so that part of a leaf is as small as what is
    placed.

    Args:
        files: from `resolve_model`.
        spec: of the same config.
        dtype: of all leaves; stored float64, float32, float16 and bfloat16 are converted, rounding to nearest even.
        place: gives each leaf's sharding; without it, or where it gives None, the default device.
        progress: called with (bytes placed so far, bytes in all) on this process.
        quantize, quantize_embeddings: "none", or what kernels and tables become (see `kept_in`).
    Returns:
        The nested dict described in `tensor_table`, of arrays, and `Quantised` pairs of them.
    Raises:
        InputError: a file is missing, cut short or not safetensors, or the tensors are not those of the spec.
    """
    table, dtype = tensor_table(spec), jnp.dtype(dtype)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plans = {}
    for path, stored in table.items():
        sharding = (place and place("/".join(path), stored.shape, dtype)) or default
        of_leaf = partial(_like, path, dtype=dtype, kind=kept_in(path, quantize, quantize_embeddings))
        parts = {
            part: (of_leaf(tuple(stop - start for start, stop in part)), devices)
            for part, devices in _parts(sharding, stored.shape).items()
        }
        plans[path] = stored, sharding, of_leaf(stored.shape), parts
    total = sum(_size(each) for *_, parts in plans.values() for each, _ in parts.values())
    done = 0
    params = {}
    with Tensors(files.folder) as tensors, ThreadPoolExecutor(_READERS) as pool:
        expected = {name: stored.stored_shape for stored in table.values() for name in stored.names}
        tensors.check(expected, spec.tie_word_embeddings)
        for path, (stored, sharding, whole, parts) in plans.items():
            arrays = {}
            for part, (of_part, devices) in parts.items():
                host = jax.tree.map(lambda x: _empty(x.shape, x.dtype), of_part)
                for read in pool.map(lambda copy: copy(), _copies(tensors, stored, part, host)):
                    done += read
                    if progress:
                        progress(done, total)
                # One at a time, and waited for: a transfer in flight would keep its host memory while others start.
                arrays |= {device: jax.block_until_ready(jax.device_put(host, device)) for device in devices}
                del host
            order = sharding.addressable_devices_indices_map(stored.shape)
            params[path] = jax.tree.map(
                lambda x, *shards, sharding=sharding: jax.make_array_from_single_device_arrays(
                    x.shape, sharding, list(shards)
                ),
                whole,
                *[arrays[device] for device in order],
            )
    return unflatten(params)


def _parts(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Part, list[Any]]:
    """The distinct parts of a leaf that this process's devices hold, each with the devices that hold it."""
    parts: dict[Part, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = (
            range(size)[part] for part, size in zip(index or (slice(None),) * len(shape), shape, strict=True)
        )
        parts.setdefault(tuple((r.start, r.stop) for r in ranges), []).append(device)
    return parts


def _size(leaf: Any) -> int:
    """Bytes of an array or its shape, or of those that a quantised matrix is made of."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array aligned to 64 bytes, which JAX takes over on a CPU instead of copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


def _copies(
    tensors: Tensors, stored: Stored, part: Part, out: np.ndarray | Quantised
) -> Iterator[Callable[[], int]]:
    """The pieces of work that fill one part of a leaf, each returning the bytes that it wrote."""

    def copy(name: str, rows: Part, target: np.ndarray | Quantised) -> Callable[[], int]:
        def run() -> int:
            tensor = tensors.read(name, rows[::-1] if stored.transposed else rows)
            ours = tensor.T if stored.transposed else tensor
            if isinstance(target, Quantised):
                found = quantise(ours.astype(target.dtype, copy=False), target.kind, target.axis)
                target.values[...], target.scales[...] = found.values, found.scales
            else:
                target[...] = ours
            return _size(target)

        return run

    if stored.stacked:
        for row, layer in enumerate(range(*part[0])):
            yield copy(stored.names[layer], part[1:], jax.tree.map(lambda x, row=row: x[row], out))
    elif isinstance(out, Quantised):
        (first, end), *columns = part
        step = max(1, _TABLE_PIECE // out.shape[1])
        for start in range(first, end, step):
            stop = min(start + step, end)
            here = slice(start - first, stop - first)
            yield copy(
                stored.name, ((start, stop), *columns), jax.tree.map(lambda x, here=here: x[here], out)
            )
    else:
        yield copy(stored.name, part, out)


def _download(name: str, revision: str, weights: bool) -> Path:
    """The folder of a hub model in the local cache, after downloading what is not there yet."""
    from huggingface_hub import errors, snapshot_download

    patterns = [
        "config.json",
        "generation_config.json",
        *TOKENIZER_FILES,
        *(_WEIGHT_FILES if weights else ()),
    ]
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise InputError(
            f"model.path {name!r} is gated: accept its terms on huggingface.co/{name}, then set HF_TOKEN or run "
            "`hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"model.path {name!r} has no revision {revision!r} on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"model.path {name!r} is neither a local folder nor a model on the hub that you may read; check the name, "
            "and for a private one set HF_TOKEN."
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        said = str(error).strip().split("\n")[0].removeprefix("Got: ")
        reason = "HF_HUB_OFFLINE is set" if offline else said
        raise InputError(
            f"model.path {name!r} is not a local folder, not complete in the local cache{at}, and cannot be "
            f"downloaded ({reason}).\nConnect to the network (and unset HF_HUB_OFFLINE), or copy the model here and "
            "give its folder."
        ) from error

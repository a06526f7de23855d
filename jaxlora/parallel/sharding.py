"""Where every array lives: one table from parameters to logical axes, one from logical axes to the mesh."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.core.errors import InputError
from jaxlora.core.spread import Spread
from jaxlora.core.tree import Path, map_leaves
from jaxlora.parallel.mesh import TRIALS

PARAMETERS: dict[str, tuple[str | None, ...]] = {
    # module's name: the logical axes of its kernel or embedding, without the leading axis of layers
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
LOGICAL: dict[str | None, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    None: None,
}
ROWS = ("data", "fsdp")
"""The mesh axes that share out the rows of a batch: fsdp devices hold different parts of the base and of the data."""


def partition(path: Path) -> PartitionSpec:
    """The partition of a leaf of the base or the adapter, from its path alone.

    Kernels and embeddings follow `PARAMETERS`; a bias follows its kernel's output, an adapter's `a` its kernel's input
    and its `b`, magnitudes and gains the kernel's output; norms are whole everywhere.
    """
    module, leaf = path[-2], path[-1]
    if module not in PARAMETERS:
        return PartitionSpec()
    first, second = (LOGICAL[axis] for axis in PARAMETERS[module])
    axes = {
        "embedding": (first, second),
        "kernel": (None, first, second),
        "bias": (None, second),
        "a": (None, first, None),
        "b": (None, None, second),
        "m": (None, second),
        "gain": (None, second),
    }
    return PartitionSpec(*axes[leaf])


def parameter_sharding(
    mesh: Mesh, path: Path, shape: tuple[int, ...], block: int = 1, axis: int = -1
) -> NamedSharding:
    """The placement of one parameter; of a quantised one, that of its values and of its scales.

    Args:
        block: numbers that stay together. axis: along which they lie, from the end.
    Raises:
        InputError: a dimension does not divide over its mesh axis; says which, and what would.
    """
    spec = partition(path)
    for dimension, (size, name) in enumerate(zip(shape, spec, strict=False)):
        together = block if dimension == len(shape) + axis else 1
        if name is not None and size // together % mesh.shape[name]:
            fits = [n for n in range(1, mesh.size + 1) if size // together % n == 0]
            counted = f"its {size}" + (f" in blocks of {together}" if together > 1 else "")
            raise InputError(
                f"mesh.{name} = {mesh.shape[name]} does not divide {'/'.join(path)} {list(shape)} ({counted}); "
                f"mesh.{name} may be {', '.join(map(str, fits))}."
            )
    return NamedSharding(mesh, spec)


def layer_together(mesh: Mesh, path: Path) -> NamedSharding:
    """Where one layer [I, O] of a kernel is for a product: whole on devices with rows of their own (`ROWS`)."""
    axes = partition(path)[1:]
    return NamedSharding(mesh, PartitionSpec(*(None if axis in ROWS else axis for axis in axes)))


def tree_shardings(mesh: Mesh, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`parameter_sharding` for every leaf of a base or an adapter."""
    return map_leaves(lambda path, leaf: parameter_sharding(mesh, path, leaf.shape), tree)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The placement of a train state: the adapter's leaves and their moments alike, all else everywhere.

    The moments are trees like the adapter somewhere inside the optimiser's state; a leaf is recognised by the last
    names of its path.
    """

    def place(path, leaf) -> NamedSharding:
        names = tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if len(names) < 2:
            return NamedSharding(mesh, PartitionSpec())
        return parameter_sharding(mesh, names, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh, micro_batches: bool) -> NamedSharding:
    """Rows over `ROWS`: [M, B, T] for a training step, [B, T] for evaluation."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS) if micro_batches else PartitionSpec(ROWS))


def activation_sharding(mesh: Mesh) -> NamedSharding:
    """The residual stream [B, T, D]: rows as in the batch, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def head_spread(placement: jax.sharding.Sharding | None, vocabulary: int) -> Spread | None:
    """How products with the head are spread over the mesh of the residual stream; None where it lies on none.

    The words are cut over `tensor` and `fsdp`, as far as they divide, and devices that hold different words compute
    the same tokens. (Stored, the head is cut over `fsdp` along its width, as the embedding that it may be: a look-up
    of words needs all words. Turning one into the other sends a device its own share of the head, not the head.)

    Args:
        placement: `activation_sharding`.
        vocabulary: V.
    """
    if not isinstance(placement, NamedSharding):
        return None
    mesh, sizes = placement.mesh, placement.mesh.shape
    candidates = (("tensor", "fsdp"), ("fsdp",), ("tensor",), ())
    words = next(axes for axes in candidates if vocabulary % math.prod(sizes[axis] for axis in axes) == 0)
    rows = tuple(axis for axis in ROWS if axis not in words)

    def at(*axes: tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    return Spread(
        head=at(words),
        tokens=at(rows),
        logits=at(rows, None, words),
        rows=at(ROWS),
        words=math.prod(sizes[axis] for axis in words),
        parts=math.prod(sizes[axis] for axis in (*rows, *words)),
    )


def attention_sharding(mesh: Mesh) -> NamedSharding:
    """Queries, keys and values of an attention kernel [B, T, H, h]: rows as in the batch, heads as the kernels."""
    return NamedSharding(mesh, PartitionSpec(ROWS, None, LOGICAL["heads"]))


def cache_sharding(mesh: Mesh, num_kv_heads: int) -> NamedSharding:
    """Keys and values of a generation [L, B, K, ...]: rows as in the batch, heads as the kernels where they divide."""
    tensor = LOGICAL["heads"]
    heads = tensor if tensor and num_kv_heads % mesh.shape[tensor] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, ROWS, heads))


def row_devices(mesh: Mesh) -> int:
    """How many shares the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def of_trials(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """A placement with a leading axis of trials before it, parted over `TRIALS` where the mesh has it."""
    return NamedSharding(mesh, PartitionSpec(TRIALS if trial_devices(mesh) > 1 else None, *spec))


def trial_devices(mesh: Mesh) -> int:
    """How many parts a sweep's trials are in, each with a base of its own."""
    return mesh.shape.get(TRIALS, 1)

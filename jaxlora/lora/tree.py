"""The adapter as a tree of its own: made, scaled, merged. Knows paths and shapes, not models.

An adapter has, for each adapted kernel `.../NAME/kernel` [L, in, out] of the base, the leaves `.../NAME/a` [L, in, R]
and `.../NAME/b` [L, R, out], float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.core.prng import named
from jaxlora.core.tree import Path, leaves, map_leaves, unflatten


def adapted_kernels(base: Mapping[str, Any], targets: Sequence[str]) -> dict[Path, Any]:
    """The base's kernels that get an adapter, by the path of their module.

    Args:
        base: parameters, or anything with their paths and leaves that have a shape.
        targets: names of projections, the last part of a module's path.
    Returns:
        {path of the module: its kernel}.
    """
    return {path[:-1]: leaf for path, leaf in leaves(base) if path[-1] == "kernel" and path[-2] in targets}


def adapter_shapes(base: Mapping[str, Any], targets: Sequence[str], rank: int) -> dict[str, Any]:
    """The adapter's tree of `jax.ShapeDtypeStruct`s for a base, the targets and a rank."""
    shapes = {}
    for path, kernel in adapted_kernels(base, targets).items():
        layers, fan_in, fan_out = kernel.shape
        shapes[(*path, "a")] = jax.ShapeDtypeStruct((layers, fan_in, rank), jnp.float32)
        shapes[(*path, "b")] = jax.ShapeDtypeStruct((layers, rank, fan_out), jnp.float32)
    return unflatten(shapes)


def init(key: jax.Array, base: Mapping[str, Any], targets: Sequence[str], rank: int) -> dict[str, Any]:
    """A new adapter that changes nothing yet: a random, b zero.

    a ~ U(-bound, bound) with bound = sqrt(6 / ((1 + 5) fan_in)) = 1 / sqrt(fan_in): PEFT's Kaiming-uniform with
    a = sqrt(5). Each leaf's key is derived from its path, so that one target's values do not depend on which others
    are chosen.

    Args:
        key: random key.
        base: parameters (their shapes are read, not their values).
        targets: names of the projections to adapt.
        rank: R.
    Returns:
        float32 tree of a [L, in, R], b [L, R, out].
    Source: Hu et al. 2021, section 4.1; He et al. 2015, equation 10.
    """

    def leaf(path: Path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] == "b":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = shape.shape[1] ** -0.5
        return jax.random.uniform(named(key, *path), shape.shape, shape.dtype, -bound, bound)

    return map_leaves(leaf, adapter_shapes(base, targets, rank))


def scale(adapter: Mapping[str, Any], factor: jax.Array | float) -> dict[str, Any]:
    """The adapter whose products are `factor` times as large: every b times the factor (alpha/r or alpha/sqrt r)."""
    return map_leaves(lambda path, x: x * factor if path[-1] == "b" else x, adapter)


def merge(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The base with a scaled adapter folded in: W + a b, summed in float32, in W's dtype.

    Args:
        base: parameters.
        adapter: already scaled (see `scale`).
    Returns:
        A tree like the base; leaves without an adapter are the same arrays.
    """
    pairs: dict[Path, dict[str, jax.Array]] = {}
    for path, leaf in leaves(adapter):
        pairs.setdefault(path[:-1], {})[path[-1]] = leaf

    def merged(path: Path, leaf: jax.Array) -> jax.Array:
        if path[-1] != "kernel" or path[:-1] not in pairs:
            return leaf
        pair = pairs[path[:-1]]
        update = jnp.einsum("LIR,LRO->LIO", pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST)
        return (leaf.astype(jnp.float32) + update).astype(leaf.dtype)

    return map_leaves(merged, base)

"""The adapter as a tree of its own: made, scaled, merged. Knows paths and shapes, not models.

An adapter has, for each adapted kernel `.../NAME/kernel` [L, in, out] of the base, the leaves `.../NAME/a` [L, in, R]
and `.../NAME/b` [L, R, out], float32. DoRA adds magnitudes (see `variants`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.prng import named
from jaxlora.core.tree import Path, leaves, map_leaves, unflatten

Factor = Mapping[str, jax.Array | float] | jax.Array | float
"""What an adapter's products are multiplied by: one number, or one for each target by its name."""


def adapted_kernels(base: Mapping[str, Any], targets: Collection[str]) -> dict[Path, Any]:
    """The base's kernels that get an adapter, by the path of their module.

    Args:
        base: parameters, or anything with their paths and leaves that have a shape.
        targets: names of projections, the last part of a module's path.
    Returns:
        {path of the module: its kernel}.
    """
    return {path[:-1]: leaf for path, leaf in leaves(base) if path[-1] == "kernel" and path[-2] in targets}


def adapter_shapes(base: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The adapter's tree of `jax.ShapeDtypeStruct`s for a base and the rank of each target."""
    shapes = {}
    for path, kernel in adapted_kernels(base, ranks.keys()).items():
        layers, fan_in, fan_out = kernel.shape
        shapes[(*path, "a")] = jax.ShapeDtypeStruct((layers, fan_in, ranks[path[-1]]), jnp.float32)
        shapes[(*path, "b")] = jax.ShapeDtypeStruct((layers, ranks[path[-1]], fan_out), jnp.float32)
    return unflatten(shapes)


def init(key: jax.Array, base: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """A new adapter that changes nothing yet: a random, b zero.

    a ~ U(-bound, bound) with bound = sqrt(6 / ((1 + 5) fan_in)) = 1 / sqrt(fan_in): PEFT's Kaiming-uniform with
    a = sqrt(5). Each leaf's key is derived from its path, so that one target's values do not depend on which others
    are chosen.

    Args:
        key: random key.
        base: parameters (their shapes are read, not their values).
        ranks: R of each projection to adapt, by name.
    Returns:
        float32 tree of a [L, in, R], b [L, R, out].
    Source: Hu et al. 2021, section 4.1; He et al. 2015, equation 10.
    """

    def leaf(path: Path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1] == "b":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = shape.shape[1] ** -0.5
        return jax.random.uniform(named(key, *path), shape.shape, shape.dtype, -bound, bound)

    return map_leaves(leaf, adapter_shapes(base, ranks))


def scale(adapter: Mapping[str, Any], factor: Factor) -> dict[str, Any]:
    """The adapter whose products are `factor` times as large: every b times it (alpha/r or alpha/sqrt r)."""

    def leaf(path: Path, x: Any) -> Any:
        if path[-1] != "b":
            return x
        return x * (factor[path[-2]] if isinstance(factor, Mapping) else factor)

    return map_leaves(leaf, adapter)


def mean(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of an adapter's parameters (a, b, DoRA's m) at several steps of one training.

    Not the mean of the products: that of K products a b has rank K R and is no adapter of rank R. Along one trajectory
    the parameters themselves may be averaged, as of any network (stochastic weight averaging): its late points lie
    around one minimum, and all of them know the same latent dimensions, the ones that training started with. Adapters
    of different trainings do not, and their parameters have no meaningful mean.

    Args:
        adapters: of one form, at least one.
    Returns:
        float32 NumPy arrays, summed in float64; of one adapter, itself.
    Source: Izmailov et al. 2018, section 3.
    """

    def leaf(*values: Any) -> np.ndarray:
        return np.asarray(np.mean(np.stack(values), axis=0, dtype=np.float64), np.float32)

    return jax.tree.map(leaf, *jax.device_get(list(adapters)))


def modules(adapter: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The adapter's leaves by the path of their module: {path: {"a": ..., "b": ..., ...}}."""
    found: dict[Path, dict[str, Any]] = {}
    for path, leaf in leaves(adapter):
        found.setdefault(path[:-1], {})[path[-1]] = leaf
    return found


def merge(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The base with an adapter folded in: g (W + a b), in float32, in W's dtype; g is 1 but for DoRA.

    Args:
        base: parameters.
        adapter: as the decoder takes it (see `variants.applied`): scaled, with DoRA's gains.
    Returns:
        A tree like the base; leaves without an adapter are the same arrays.
    """
    adapted = modules(adapter)

    def merged(path: Path, leaf: jax.Array) -> jax.Array:
        if path[-1] != "kernel" or path[:-1] not in adapted:
            return leaf
        parts = adapted[path[:-1]]
        update = jnp.einsum("LIR,LRO->LIO", parts["a"], parts["b"], precision=jax.lax.Precision.HIGHEST)
        kernel = leaf.astype(jnp.float32) + update
        if "gain" in parts:
            kernel = kernel * parts["gain"][:, None, :]
        return kernel.astype(leaf.dtype)

    return map_leaves(merged, base)

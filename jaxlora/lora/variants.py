"""What differs from plain LoRA: DoRA's magnitudes, PiSSA's start, a rank for each module.

The decoder knows none of it. `applied` turns what is trained into what the decoder reads, for each projection a pair
and perhaps a gain; `ordinary` turns it into an adapter that every reader of PEFT folders takes as it is.

- DoRA (Liu et al. 2024, equation 5): W' = m (W + s a b) / ||W + s a b||, the norm taken over the inputs of each output
  and held constant in the gradient (section 4.3). The adapter has a third leaf `m` [L, out]; the decoder reads m over
  that norm as `gain` [L, out].
- PiSSA (Meng et al. 2024, equations 2 to 4): a and b start as the largest singular triplets of W, and the base loses
  what they hold. Here the base stays as it is, shared and unrounded: the starting pair stands beside the adapter as its
  `anchor`, and s (a b - a0 b0) is what the decoder adds.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.prng import named
from jaxlora.core.products import contract
from jaxlora.core.quantised import Quantised, plain
from jaxlora.core.tree import Path, leaves, map_leaves, unflatten
from jaxlora.lora.spec import LoraSpec
from jaxlora.lora.tree import Factor, adapted_kernels, init, modules, scale

OVERSAMPLING = 10
"""Columns beyond the rank that a randomised decomposition carries along (Halko et al. 2011, section 4.2)."""


def applied(
    adapter: Mapping[str, Any],
    factor: Factor,
    anchor: Mapping[str, Any] | None = None,
    norms: Mapping[Path, jax.Array] | None = None,
) -> dict[str, Any]:
    """The decoder's "lora" collection: scaled pairs, less PiSSA's anchor, with DoRA's gains.

    Args:
        adapter: unscaled a and b, and with DoRA m; what is differentiated.
        factor: what the products are multiplied by: one number, or one for each target by its name.
        anchor: PiSSA's starting pairs; None or {} for none.
        norms: with DoRA, from `column_norms`.
    """
    scaled = scale(anchored(adapter, anchor) if anchor else adapter, factor)
    if not norms:
        return scaled
    found = {}
    for path, leaf in leaves(scaled):
        if path[-1] == "m":
            found[(*path[:-1], "gain")] = leaf / norms[path[:-1]]
        else:
            found[path] = leaf
    return unflatten(found)


def effective(
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
    factor: Factor,
    anchor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`applied`, for whoever does not differentiate it: with the base at hand, DoRA's norms are found here.

    Args:
        base: parameters; read with DoRA alone.
        adapter, factor, anchor: as for `applied`.
    """
    return applied(adapter, factor, anchor, column_norms(base, adapter, factor, anchor))


def start(
    key: jax.Array, base: Mapping[str, Any], spec: LoraSpec, initialisation: str = "kaiming"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A new adapter that changes nothing yet.

    Args:
        key: random key.
        base: parameters. Their values are read with PiSSA and DoRA alone.
        spec: targets, ranks and scales.
        initialisation: "kaiming" (a random, b zero), "pissa", or "pissa_niter_N": the singular vectors by N rounds of
            subspace iteration instead of a whole decomposition.
    Returns:
        (adapter, anchor): float32 trees; the anchor is {} but for PiSSA.
    """
    if initialisation.startswith("pissa"):
        rounds = initialisation.removeprefix("pissa").removeprefix("_niter_")
        adapter = principal(base, spec, named(key, "pissa"), int(rounds) if rounds else None)
        anchor = jax.tree.map(jnp.copy, adapter)
    else:
        adapter, anchor = init(key, base, spec.ranks), {}
    if spec.use_dora:
        kernels = adapted_kernels(base, spec.targets)
        norms = {(*path, "m"): jnp.sqrt(jax.lax.map(_squares, kernel)) for path, kernel in kernels.items()}
        adapter = unflatten(dict(leaves(adapter)) | norms)
    return adapter, anchor


# ---- DoRA ----------------------------------------------------------------------------------------------------------


def column_norms(
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
    factor: Factor,
    anchor: Mapping[str, Any] | None = None,
) -> dict[Path, jax.Array]:
    """||W + s a b|| over the inputs of each output, without W + s a b.

    ||W + a b||^2 = ||W||^2 + 2 b . (a^T W) + b . (a^T a) b, column by column: R numbers a column, where the sum
    would be another whole matrix.

    Args:
        base: parameters.
        adapter, factor, anchor: as for `applied`. The result is a constant to differentiation.
    Returns:
        {path of the module: float32 [L, out]} for every module with a magnitude; {} for plain LoRA.
    """
    scaled = scale(anchored(adapter, anchor) if anchor else adapter, factor)
    adapted = {path: parts for path, parts in modules(scaled).items() if "m" in parts}
    kernels = adapted_kernels(base, {path[-1] for path in adapted})

    def layer(inputs: tuple[Any, ...]) -> jax.Array:  # one at a time: in float32, all would be twice the base
        kernel, a, b = plain(inputs[0]), *inputs[1:]
        gram = jnp.einsum("IR,IP->RP", a, a, precision=jax.lax.Precision.HIGHEST)
        inner = 2 * contract("IO,IR->RO", kernel, a)
        inner += jnp.einsum("RP,PO->RO", gram, b, precision=jax.lax.Precision.HIGHEST)
        return jnp.sqrt(_squares(kernel) + jnp.sum(b * inner, axis=0))

    return {
        path: jax.lax.map(layer, jax.lax.stop_gradient((kernels[path], parts["a"], parts["b"])))
        for path, parts in adapted.items()
    }


def _squares(kernel: jax.Array | Quantised) -> jax.Array:
    """||W||^2 over the inputs of each output: [I, O] -> [O]."""
    return jnp.sum(jnp.square(plain(kernel).astype(jnp.float32)), axis=0)


# ---- PiSSA ---------------------------------------------------------------------------------------------------------


def principal(
    base: Mapping[str, Any], spec: LoraSpec, key: jax.Array, rounds: int | None = None
) -> dict[str, Any]:
    """Pairs whose scaled product is the best approximation of each kernel at its rank.

    s a b = U_R S_R V_R^T,   a = U_R sqrt(S_R / s),   b = sqrt(S_R / s) V_R^T

    Args:
        base: parameters.
        spec: ranks and scales; no rank may exceed either side of its kernel.
        key: random key, for a randomised decomposition.
        rounds: of subspace iteration (Halko et al. 2011, algorithm 4.4); None for a whole decomposition.
    Source: Meng et al. 2024 (PiSSA), equations 2 and 3.
    """
    found = {}
    for path, kernel in adapted_kernels(base, spec.targets).items():
        rank, factor = spec.ranks[path[-1]], spec.scales[path[-1]]

        def layer(
            inputs: tuple[jax.Array | Quantised, jax.Array], rank=rank, factor=factor
        ) -> tuple[jax.Array, jax.Array]:
            matrix, layer_key = plain(inputs[0]).astype(jnp.float32), inputs[1]
            left, values, right = _svd(matrix, rank, layer_key, rounds)
            root = jnp.sqrt(values / factor)
            return left * root[None, :], root[:, None] * right

        keys = jax.random.split(named(key, *path), kernel.shape[0])
        found[(*path, "a")], found[(*path, "b")] = jax.lax.map(layer, (kernel, keys))
    return unflatten(found)


def _svd(matrix: jax.Array, rank: int, key: jax.Array, rounds: int | None) -> tuple[jax.Array, ...]:
    """The largest `rank` singular triplets of a float32 matrix [I, O]: [I, R], [R], [R, O]."""
    if rounds is None:
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    width = min(rank + OVERSAMPLING, *matrix.shape)
    with jax.default_matmul_precision("highest"):
        basis = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], width)))[0]
        for _ in range(rounds):
            basis = jnp.linalg.qr(matrix.T @ basis)[0]
            basis = jnp.linalg.qr(matrix @ basis)[0]
        left, values, right = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
        return (basis @ left)[:, :rank], values[:rank], right[:rank]


def anchored(adapter: Mapping[str, Any], anchor: Mapping[str, Any]) -> dict[str, Any]:
    """The pairs [a, a0] and [b; -b0], whose product is a b - a0 b0."""
    start = dict(leaves(anchor))

    def both(path: Path, leaf: Any) -> Any:
        if path[-1] == "a":
            return jnp.concatenate([leaf, start[path]], axis=2)
        return jnp.concatenate([leaf, -start[path]], axis=1) if path[-1] == "b" else leaf

    return map_leaves(both, adapter)


# ---- for everyone else ---------------------------------------------------------------------------------------------


def ordinary(
    adapter: Mapping[str, Any], spec: LoraSpec, anchor: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], LoraSpec]:
    """The same function as an adapter of one rank and one scale, which needs no anchor.

    An anchor doubles the rank, as PEFT's conversion of PiSSA does. Pairs of lower rank than others are filled up with
    zeros, and what their own scale differs by goes into b: readers that do not know of ranks by module (vLLM takes one
    scale for all) compute what was trained.

    Args:
        adapter: unscaled.
        spec: its constants.
        anchor: PiSSA's starting pairs; None or {} for none.
    Returns:
        (adapter, spec): float32 NumPy arrays, and constants without a pattern of ranks.
    """
    ranks, scales = spec.ranks, spec.scales
    width = max(ranks.values()) * (2 if anchor else 1)
    pairs = jax.device_get(anchored(adapter, anchor) if anchor else adapter)

    def uniform(path: Path, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf, np.float32)
        if path[-1] == "m":
            return leaf
        axis = 2 if path[-1] == "a" else 1
        if path[-1] == "b" and scales[path[-2]] != spec.scale:
            leaf = leaf * np.float32(scales[path[-2]] / spec.scale)
        padding = [(0, 0)] * 3
        padding[axis] = (0, width - leaf.shape[axis])
        return np.pad(leaf, padding) if width > leaf.shape[axis] else leaf

    changed = width != spec.rank or spec.rank_pattern
    return map_leaves(uniform, pairs), spec.with_rank(width) if changed else spec

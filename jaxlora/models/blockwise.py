"""Attention in blocks of queries and keys, in plain XLA: memory is linear in the length of a row, on any platform.

The scores of one block of queries and one of keys exist at a time. Going forward, the softmax is summed as the blocks
of keys come by (Milakov and Gimelshein 2018; Rabe and Staats 2021); what is kept for the way back is the output and
one number a query, the logarithm of its softmax's denominator, from which any block's weights are computed again
(Dao et al. 2022, algorithm 4).

Where the keys are the queries' own row, blocks that lie wholly in the future or before the window are not computed:
examples are contiguous, so no token sees a later index, or one further back than the window.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.core.kept import kept_residual
from jaxlora.core.products import contract
from jaxlora.models.places import MASKED, Places, visible

BLOCK = 512
"""Queries and keys in a block: at 512, scores are a fifth to a half of what else a layer holds for as many tokens."""

_TINY = 1e-30  # under the fraction of a query that sees nothing: its sum is zero, and so is its output


def blockwise(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    queries: Places,
    keys: Places | None,
    window: int | None,
    block: int = BLOCK,
) -> Float[Array, "B T H h"]:
    """What `plain` computes, in memory linear in T and S.

    Args:
        q, k, v: queries, keys and values; H is a multiple of K.
        queries: where the queries stand.
        keys: where the keys stand; None where they are the queries' own row (S = T), which saves half of the work.
        window: sliding window in tokens, or None.
        block: queries and keys in a block.
    Returns:
        In q's dtype; zero for queries that see no key (padding).
    """
    own = keys is None
    keys = queries if keys is None else keys
    batch, time, heads, width = q.shape
    kv_heads = k.shape[2]
    rows, columns = min(block, time), min(block, k.shape[1])
    grouped = q.reshape(batch, time, kv_heads, heads // kv_heads, width)
    out: Any = _attend(
        window,
        own,
        _cut(grouped, rows).transpose(1, 0, 3, 4, 2, 5),
        _cut(k, columns).transpose(1, 0, 3, 2, 4),
        _cut(v, columns).transpose(1, 0, 3, 2, 4),
        Places(*(_cut(x, rows).swapaxes(0, 1) for x in queries)),
        Places(*(_cut(x, columns).swapaxes(0, 1) for x in keys)),
    )
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :time]


def pad_time(x: Array, multiple: int) -> Array:
    """[B, T, ...] with zeros behind it, to a whole multiple: segment 0, which nobody sees."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)])


def _cut(x: Array, block: int) -> Array:
    """[B, T, ...] as [B, blocks, block, ...]."""
    x = pad_time(x, block)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _keys_of(i: Int[Array, ""], own: bool, window: int | None, block: int, count: int):
    """The blocks of keys, from and to, that any query of block i can see."""
    if not own:
        return 0, count
    first = 0 if window is None else jnp.maximum(i * block - (window - 1), 0) // block
    return first, i + 1


def _queries_of(j: Int[Array, ""], own: bool, window: int | None, block: int, count: int):
    """The blocks of queries, from and to, that can see any key of block j."""
    if not own:
        return 0, count
    last = count if window is None else jnp.minimum(((j + 1) * block + window - 2) // block + 1, count)
    return j, last


def _scores(q, k, queries: Places, keys: Places, window: int | None):
    """Scaled scores [B, K, G, T, S] of a block, and which of them count."""
    mask = visible(*queries, *keys, window)[:, None, None, :, :]
    scores = contract("BKGTh,BKSh->BKGTS", q, k) * q.shape[-1] ** -0.5
    return jnp.where(mask, scores, MASKED), mask


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, own, q, k, v, queries, keys):
    """Attention of arrays that are cut: a leading axis of blocks; q [_, B, K, G, T, h], k and v [_, B, K, S, h]."""
    return _forward(window, own, q, k, v, queries, keys)[0]


def _forward(window, own, q, k, v, queries, keys):
    def one_block(inputs):
        i, q, queries = inputs

        def add(j, carry):
            highest, total, out = carry
            scores, mask = _scores(q, k[j], queries, Places(*(x[j] for x in keys)), window)
            higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - higher[..., None]), 0.0)
            shrunk = jnp.exp(highest - higher)
            out = out * shrunk[..., None] + contract("BKGTS,BKSh->BKGTh", weights.astype(v.dtype), v[j])
            return higher, total * shrunk + jnp.sum(weights, axis=-1), out

        start = jnp.full(q.shape[:-1], MASKED, jnp.float32), *_zeros(q.shape[:-1], q.shape)
        bounds = _keys_of(i, own, window, q.shape[-2], len(k))
        highest, total, out = jax.lax.fori_loop(*bounds, add, start)
        total = jnp.maximum(total, _TINY)
        return (out / total[..., None]).astype(q.dtype), highest + jnp.log(total)

    out, denominators = jax.lax.map(one_block, (jnp.arange(len(q)), q, queries))
    out, denominators = kept_residual(out, "attention"), kept_residual(denominators, "attention")
    return out, (q, k, v, queries, keys, out, denominators)


def _backward(window, own, residuals, cotangent):
    q, k, v, queries, keys, out, denominators = residuals
    cotangent = cotangent.astype(q.dtype)
    # The softmax's gradient needs, of each query, the product of its output and the output's cotangent.
    inner = jnp.sum(out.astype(jnp.float32) * cotangent, axis=-1)

    def one_block(dq, inputs):
        j, k, v, keys = inputs

        def add(i, carry):
            dq, dk, dv = carry
            here = q[i]
            scores, mask = _scores(here, k, Places(*(x[i] for x in queries)), keys, window)
            weights = jnp.where(mask, jnp.exp(scores - denominators[i][..., None]), 0.0)
            dweights = contract("BKGTh,BKSh->BKGTS", cotangent[i], v)
            dscores = weights * (dweights - inner[i][..., None]) * here.shape[-1] ** -0.5
            dscores = dscores.astype(here.dtype)
            dv = dv + _over_groups("BKGTS,BKGTh->BKSh", weights.astype(v.dtype), cotangent[i])
            dk = dk + _over_groups("BKGTS,BKGTh->BKSh", dscores, here)
            return dq.at[i].add(contract("BKGTS,BKSh->BKGTh", dscores, k)), dk, dv

        bounds = _queries_of(j, own, window, k.shape[-2], len(q))
        dq, dk, dv = jax.lax.fori_loop(*bounds, add, (dq, *_zeros(k.shape, v.shape)))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    (start,) = _zeros(q.shape)
    dq, (dk, dv) = jax.lax.scan(one_block, start, (jnp.arange(len(k)), k, v, keys))
    return dq.astype(q.dtype), dk, dv, None, None


def _zeros(*shapes: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)


_over_groups = partial(jnp.einsum, preferred_element_type=jnp.float32)

_attend.defvjp(_forward, _backward)

"""Attention that makes the scores that a row's examples need, and no others: for CPUs.

Of the scores of a packed row most are masked: those of the future, and those of one example with another. Here a block
of queries meets the keys from the block on in which its first example begins, up to its own: one product and one
softmax, as the formula has them, over few keys. How many blocks of keys that are is up to the row's segments, so the
program has a branch for each number. What is kept for the way back is, of each query, its output and the logarithm of
its softmax's denominator, from which the weights are computed again (Dao et al. 2022, algorithm 4).

Rows and blocks go one after the other: right for a few cores, whose caches a block's scores fit, wrong for a chip that
wants all the work at once.

Rows of no more than two blocks leave little to find out: one block of four lies in the future, whatever the examples
are. There the formula is applied to each block of queries of all rows at once, and to the keys up to it, as long as the
rows are few enough for a cache, too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlora.core.kept import bits, floats, kept_residual
from jaxlora.core.products import contract
from jaxlora.models.blockwise import pad_time
from jaxlora.models.places import MASKED
from jaxlora.models.plain import plain

BLOCK = 128
"""Queries in a block, and the unit in which its keys are counted: 256 took longer, 64 no less (docs/lab-notes.md)."""

_FEW = 2
"""Blocks up to which a row has too few for branches to pay: at three they do (docs/lab-notes.md, 2026-11-28)."""

_AT_ONCE = 16 * 2**20
"""Bytes of float32 scores up to which the rows of a batch go together. With 38 MB they took longer than one by one."""


def sparse(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    segments: Int[Array, "B T"],
    window: int | None,
    block: int = BLOCK,
) -> Float[Array, "B T H h"]:
    """What `plain` computes, in memory linear in T, without most of what a mask would drop.

    Args:
        q, k, v: queries, keys and values; H is a multiple of K.
        segments: example number within the row; 0 for padding. Examples are contiguous.
        window: sliding window in tokens, or None.
        block: queries in a block.
    Returns:
        In q's dtype; something finite for padding.
    """
    time, block = q.shape[1], min(block, q.shape[1])
    if time <= _FEW * block and 4 * q.shape[0] * q.shape[2] * block * time <= _AT_ONCE:
        return _up_to_own(q, k, v, segments, window, block)
    q, k, v, segments = (pad_time(x, block) for x in (q, k, v, segments))
    out: Any = _attend(window, block, q, k, v, segments)
    return out[:, :time]


def _up_to_own(q, k, v, segments, window, block):
    """Each block of queries with all keys up to its last one, in the order of the row."""
    found = []
    for start in range(0, q.shape[1], block):
        end = min(start + block, q.shape[1])
        mask = _seen(segments[:, start:end], segments[:, :end], start, window)
        found.append(plain(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(found, axis=1)


def _seen(
    of_queries: Int[Array, "*B T"], of_keys: Int[Array, "*B S"], ahead: Any, window: int | None
) -> Bool[Array, "*B T S"]:
    """Which keys each query sees.

    Args:
        of_queries, of_keys: their segments. ahead: how many indices the first query is after the first key.
    """
    distance = ahead + jnp.arange(of_queries.shape[-1])[:, None] - jnp.arange(of_keys.shape[-1])[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = of_queries[..., :, None] == of_keys[..., None, :]
    return same & jnp.broadcast_to(near, same.shape)


def _counts(blocks: int) -> list[int]:
    """The numbers of blocks of keys that there are branches for: all up to 4, then half as many again and again."""
    counts = [1]
    while counts[-1] < blocks:
        counts.append(min(blocks, max(counts[-1] + 1, counts[-1] * 3 // 2)))
    return counts


def _branches(segments: Int[Array, "B T"], block: int, window: int | None) -> Int[Array, "B N"]:
    """Of each block of queries, the index in `_counts` of the fewest blocks of keys, up to its own, that it can see."""
    rows, time = segments.shape
    index = jnp.arange(time)[None, :]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    if window is not None:
        first = jnp.maximum(first, index - (window - 1))
    first = jnp.where(segments > 0, first, index)  # padding sees what happens to be there
    first = jnp.min(first.reshape(rows, -1, block), axis=-1) // block
    needed = jnp.arange(time // block)[None, :] - first + 1
    return jnp.searchsorted(jnp.asarray(_counts(time // block)), needed)


class _Near(NamedTuple):
    """The keys that a block of queries meets.

    Attributes:
        start: index of the first in the row.
        keys, values: of the queries' dtype.
        mask: which of them each query sees.
    """

    start: Int[Array, ""]
    keys: Float[Array, "K S h"]
    values: Float[Array, "K S h"]
    mask: Bool[Array, "1 GT S"]


def _near(i, count: int, block: int, window: int | None, queries: Array, k: Array, v: Array, segments: Array):
    """Block i's keys: `count` blocks up to it, or the row's first ones where there are not so many before it."""
    start = jnp.maximum(i + 1 - count, 0) * block

    def cut(x, at, size, axis):
        return jax.lax.dynamic_slice_in_dim(x, at, size, axis)

    keys, values = (floats(cut(x, start, count * block, 1), queries.dtype) for x in (k, v))
    of_queries, of_keys = cut(segments, i * block, block, 0), cut(segments, start, count * block, 0)
    mask = _seen(of_queries, of_keys, i * block - start, window)
    return _Near(start, keys, values, jnp.tile(mask, (queries.shape[1] // block, 1))[None])


def _scores(q: Float[Array, "K GT h"], near: _Near) -> Float[Array, "K GT S"]:
    return contract("KTh,KSh->KTS", q, near.keys) * q.shape[-1] ** -0.5


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, block, q, k, v, segments):
    return _forward(window, block, q, k, v, segments)[0]


def _forward(window, block, q, k, v, segments):
    # Segments are known before the layers are: what depends on them alone, as the masks of all blocks, would otherwise
    # be computed once for all layers and kept, with the scores' shape, where a layer is rematerialised.
    q, k, v, segments = jax.lax.optimization_barrier((q, k, v, segments))
    branches = _branches(segments, block, window)

    def one_row(row):
        q_row, k_row, v_row, segments, branches = row
        blocks, k, v = _in_blocks(q_row, k_row.shape[1], block), k_row.swapaxes(0, 1), v_row.swapaxes(0, 1)

        def one_block(inputs):
            i, here, branch = inputs
            here = floats(here, q.dtype)

            def over(count: int):
                near = _near(i, count, block, window, here, k, v, segments)
                scores = jnp.where(near.mask, _scores(here, near), MASKED)
                top = jnp.max(scores, axis=-1)
                weights = jnp.exp(scores - top[..., None]).astype(q.dtype)
                total = jnp.sum(weights, axis=-1, dtype=jnp.float32)
                out = contract("KTS,KSh->KTh", weights, near.values)
                return bits((out / total[..., None]).astype(q.dtype)), top + jnp.log(total)

            return jax.lax.switch(branch, _each(over, len(blocks)))

        out, denominators = jax.lax.map(one_block, (jnp.arange(len(blocks)), blocks, branches))
        return _in_a_row(out, block), denominators

    out, denominators = jax.lax.map(one_row, (*map(bits, (q, k, v)), segments, branches))
    out, denominators = (
        kept_residual(floats(out, q.dtype), "attention"),
        kept_residual(denominators, "attention"),
    )
    return out, (q, k, v, segments, branches, out, denominators)


def _backward(window, block, residuals, cotangent):
    q, k, v, segments, branches, out, denominators = residuals
    # The softmax's gradient needs, of each query, the product of its output and the output's cotangent.
    slope, inner = cotangent.astype(q.dtype), jnp.sum(out.astype(jnp.float32) * cotangent, axis=-1)

    def one_row(row):
        q_row, k_row, v_row, slope_row, inner_row, segments, denominators, branches = row
        k, v = k_row.swapaxes(0, 1), v_row.swapaxes(0, 1)
        cut = partial(_in_blocks, kv_heads=len(k), block=block)
        queries, slopes = cut(q_row), cut(slope_row)
        # A product over queries wants them last in one operand. Turned where they are used, the compiler would turn the
        # product instead, into one that its CPU backend has for float32 alone.
        blocks = (
            queries,
            slopes,
            queries.swapaxes(2, 3),
            slopes.swapaxes(2, 3),
            cut(inner_row[..., None])[..., 0],
            denominators,
            branches,
        )

        def one_block(sums, inputs):
            i, *arrays, inner, denominators, branch = inputs
            here, slope, here_turned, slope_turned = (floats(x, q.dtype) for x in arrays)

            def over(count: int, *sums):
                near = _near(i, count, block, window, here, k, v, segments)
                weights = jnp.exp(_scores(here, near) - denominators[..., None])
                weights = jnp.where(near.mask, weights, 0.0).astype(q.dtype)
                dweights = contract("KTh,KSh->KTS", slope, near.values) - inner[..., None]
                dscores = (weights * dweights * here.shape[-1] ** -0.5).astype(q.dtype)
                new = (
                    contract("KhT,KTS->KhS", here_turned, dscores),
                    contract("KhT,KTS->KhS", slope_turned, weights),
                )
                sums = tuple(_added(x, y, near.start) for x, y in zip(sums, new, strict=True))
                return sums, bits(contract("KTS,KSh->KTh", dscores, near.keys).astype(q.dtype))

            return jax.lax.switch(branch, _each(over, len(blocks[0])), *sums)

        zeros = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32)
        (dk, dv), dq = jax.lax.scan(one_block, (zeros, zeros), (jnp.arange(len(branches)), *blocks))
        dk, dv = (x.astype(q.dtype).transpose(2, 0, 1) for x in (dk, dv))
        return _in_a_row(dq, block), bits(dk), bits(dv)

    rows = *map(bits, (q, k, v, slope)), inner, segments, denominators, branches
    return *(floats(x, q.dtype) for x in jax.lax.map(one_row, rows)), None


_attend.defvjp(_forward, _backward)


def _each(over: Callable[..., Any], blocks: int) -> list[Callable[..., Any]]:
    return [partial(over, count) for count in _counts(blocks)]


def _in_blocks(x: Array, kv_heads: int, block: int) -> Array:
    """A row [T, H, h] as [N, K, G block, h]: the queries of a block that share a key head are rows of one product.

    It is a row that is turned round, and not the batch: fused with what makes queries of the projections' products, to
    turn them takes ten times as long (docs/lab-notes.md).
    """
    x = x.reshape(-1, block, kv_heads, x.shape[1] // kv_heads, x.shape[2]).transpose(0, 2, 3, 1, 4)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _in_a_row(x: Array, block: int) -> Array:
    """The inverse of `_in_blocks`."""
    x = x.reshape(*x.shape[:2], -1, block, x.shape[-1]).transpose(0, 3, 1, 2, 4)
    return x.reshape(x.shape[0] * block, -1, x.shape[-1])


def _added(x: Float[Array, "K h T"], part: Float[Array, "K h S"], start: Int[Array, ""]):
    old = jax.lax.dynamic_slice_in_dim(x, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x, old + part, start, axis=2)

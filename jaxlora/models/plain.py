"""The formula of attention, with all scores in memory at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlora.core.kept import kept_residual
from jaxlora.core.products import contract, transposed
from jaxlora.models.places import MASKED


def plain(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """The formula, term by term.

    Returns:
        In q's dtype. Queries that see no key (padding) return the mean of v.
    """
    batch, time, heads, width = q.shape
    grouped = q.reshape(batch, time, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    out: Any = _plain(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None, None, :, :])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, width)


@jax.custom_vjp
def _plain(q, k, v, mask):
    """q [B, K, G, T, h], k and v [B, K, S, h], mask [B, 1, 1, T, S]: heads before time, as scores have them."""
    return _plain_forward(q, k, v, mask)[0]


def _plain_forward(q, k, v, mask):
    scores = contract("BKGTh,BKSh->BKGTS", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)).astype(v.dtype)
    total = jnp.sum(weights, axis=-1, dtype=jnp.float32)
    # Divided here, and not in the weights, of which there are S for each of the h of these.
    out = contract("BKGTS,BKSh->BKGTh", weights, v) / total[..., None]
    out = kept_residual(out.astype(q.dtype), "attention")
    return out, (q, k, v, mask, out, weights, total)


def _plain_backward(residuals, cotangent):
    q, k, v, mask, out, weights, total = residuals
    slope = (cotangent / total[..., None]).astype(q.dtype)
    inner = jnp.sum(out.astype(jnp.float32) * slope, axis=-1)
    dweights = contract("BKGTh,BKSh->BKGTS", slope, v) - inner[..., None]
    dscores = jnp.where(mask, weights * dweights * q.shape[-1] ** -0.5, 0.0).astype(q.dtype)
    dq = contract("BKGTS,BKSh->BKGTh", dscores, k)
    dk, dv = transposed("BKGTh,BKGTS->BKhS", q, dscores), transposed("BKGTh,BKGTS->BKhS", slope, weights)
    return dq.astype(q.dtype), dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype), None


_plain.defvjp(_plain_forward, _plain_backward)

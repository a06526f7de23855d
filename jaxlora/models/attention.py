"""Grouped-query attention over packed, padded and cached keys, by one formula."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlora.core.products import contract

MASKED = -1e30
"""Score of a forbidden key: finite, so that a row of padding, which may see nothing, stays free of NaN."""


def visible(
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query may see: same example, not later, not further back than the window.

    Positions restart at each example, so comparing them inside a segment is the causal mask; segment 0 is padding.

    Args:
        q_positions, k_positions: position of each token within its own example.
        q_segments, k_segments: example number within the row from 1; 0 for padding.
        window: sliding window in tokens (a query sees itself and the `window - 1` before it), or None.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    allowed = same & (distance >= 0)
    return allowed if window is None else allowed & (distance < window)


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """Softmax attention, scores and softmax in float32.

    softmax(q k^T / sqrt(h) + mask) v, where query heads G*i .. G*i + G - 1 share key/value head i (G = H / K).

    Returns:
        float32 [B, T, H, h]. Queries that see no key (padding) return the mean of v: their loss weight is zero.
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA).
    """
    batch, time, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.reshape(batch, time, k.shape[2], groups, width)
    scores = contract("BTKGh,BSKh->BKGTS", q, k) * width**-0.5
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    out = contract("BKGTS,BSKh->BTKGh", weights.astype(v.dtype), v)
    return out.reshape(batch, time, heads, width)


def rotate(x: Float[Array, "B T X h"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T X h"]:
    """Rotary position embedding in float32, halves rotated as in Hugging Face's layout.

    Args:
        x: queries or keys.
        positions: position of each token within its example.
        theta: base of the geometric series of wavelengths (`rope_theta`).
    Returns:
        As x, in x's dtype.
    Source: Su et al. 2021 (RoFormer), section 3.4.2.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

"""Grouped-query attention over packed, padded and cached keys: one function, several ways to compute it.

    plain      the formula, with all scores [B, H, T, S] in memory (`plain.py`)
    blockwise  the same in blocks, linear in T (`blockwise.py`); XLA, on any platform
    sparse     the blocks alone that a row's examples need, one after the other (`sparse.py`); XLA, for CPUs
    splash     a Pallas kernel for TPUs (`kernels.py`)
    cudnn      cuDNN's flash attention for NVIDIA GPUs (`kernels.py`)

Which one when, and why, is in docs/attention.md.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from jaxlora.models.blockwise import blockwise
from jaxlora.models.kernels import kernel
from jaxlora.models.places import Places, visible
from jaxlora.models.plain import plain
from jaxlora.models.sparse import BLOCK

LONG = 2048
"""From T S = LONG^2 on, XLA attends in blocks: see the memory of both in docs/attention.md."""

KERNEL_FROM = 512
"""Tokens in a row from which on a kernel of the platform's own is used, where there is one."""

SPARSE_FROM = BLOCK + 1
"""Tokens in a row from which on a CPU leaves out scores: more than a block of `sparse.py`."""

MASK_UP_TO = 8192
"""The longest row for which cuDNN's mask, 2 T^2 bytes a row, is worth its memory. Where `stretches` are known there is
none."""

_SERVED_BY = {"splash": ("tpu", "a TPU"), "cudnn": ("cuda", "an NVIDIA GPU (Ampere or later)")}


@dataclass(frozen=True)
class Attention:
    """How a decoder attends.

    Attributes:
        kind: "auto", "plain", "blockwise", "sparse", "splash" or "cudnn".
        platform: what programs are compiled for: "cpu", "tpu", "gpu", or "cuda" for a GPU that cuDNN's kernels run on.
        sharding: placement of the queries [B, T, H, h], rows and heads, for kernels; None for one device.
        interpret: run splash attention's definition, on any platform; for tests.
        stretches: the most examples that a row of a batch has, one more for its padding; None where that is not known,
            or where nothing can be made of it.
    """

    kind: str = "auto"
    platform: str = "cpu"
    sharding: NamedSharding | None = None
    interpret: bool = False
    stretches: int | None = None

    def refusal(self, head_dim: int, dtype: Any) -> str | None:
        """Why this kind cannot be, as half a sentence; None where it can.

        Args:
            head_dim: h. dtype: of queries, keys and values.
        """
        platform, device = _SERVED_BY.get(self.kind, ("", ""))
        if platform and platform != self.platform and not (self.kind == "splash" and self.interpret):
            return f"needs {device}, and this runs on a {self.platform}"
        if self.kind == "cudnn" and jnp.dtype(dtype).itemsize != 2:
            return f"computes in bfloat16, and model.dtype is {jnp.dtype(dtype).name}"
        if self.kind == "cudnn" and (head_dim % 8 or head_dim > 128):
            return f"takes head dimensions that are multiples of 8 up to 128, and the model's is {head_dim}"
        return None

    def chosen(self, time: int, keys: int, own: bool, head_dim: int, dtype: Any) -> str:
        """The kind for these shapes.

        Args:
            time, keys: T and S. own: whether the keys are the queries' own row, and not a cache.
            head_dim: h. dtype: of queries, keys and values.
        """
        by_length = "blockwise" if time * keys >= LONG**2 else "plain"
        if not own:  # a cache: no kernel here takes one
            return "plain" if self.kind == "plain" else by_length
        if self.kind != "auto":
            return self.kind
        if self.platform == "cpu":
            return "sparse" if time >= SPARSE_FROM else "plain"
        for kind, longest in (("splash", None), ("cudnn", MASK_UP_TO if self.stretches is None else None)):
            there = Attention(kind, self.platform).refusal(head_dim, dtype) is None
            if there and KERNEL_FROM <= time <= (longest or time):
                return kind
        return by_length


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    queries: Places,
    keys: Places | None,
    window: int | None,
    how: Attention = Attention(),
) -> Float[Array, "B T H h"]:
    """Softmax attention of each query to the keys that it may see, scores and softmax in float32.

    softmax(q k^T / sqrt(h) + mask) v, where query heads G*i .. G*i + G - 1 share key/value head i (G = H / K).

    Args:
        q, k, v: queries, keys and values.
        queries: where the queries stand.
        keys: where the keys stand; None where they are the queries' own row (S = T; examples are contiguous).
        window: sliding window in tokens (a query sees itself and the `window - 1` before it), or None.
        how: the kind of computation; it changes rounding, memory and speed alone.
    Returns:
        float32 [B, T, H, h]. Queries that see no key (padding) return something finite: their loss weight is zero.
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA).
    """
    kind = how.chosen(q.shape[1], k.shape[1], keys is None, q.shape[-1], q.dtype)
    if kind == "plain":
        mask = visible(*queries, *(queries if keys is None else keys), window)
        return plain(q, k, v, mask).astype(jnp.float32)
    if kind == "blockwise":
        return blockwise(q, k, v, queries, keys, window).astype(jnp.float32)
    compute = kernel(kind, window, how.sharding, how.interpret, how.stretches)
    return compute(q, k, v, queries.segments).astype(jnp.float32)


class Rotation(NamedTuple):
    """The angles by which a row's queries and keys are turned; the same for all layers.

    Attributes:
        cos, sin: of each token's position times each of the wavelengths' frequencies, float32.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotation(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rotation:
    """The angles of rotary position embedding.

    Args:
        positions: position of each token within its example.
        head_dim: h.
        theta: base of the geometric series of wavelengths (`rope_theta`).
    Source: Su et al. 2021 (RoFormer), section 3.4.2.
    """
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T X h"], by: Rotation) -> Float[Array, "B T X h"]:
    """Rotary position embedding in float32, halves rotated as in Hugging Face's layout; in x's dtype."""
    cos, sin = (angle[:, :, None, :] for angle in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

"""Choosing the next id from logits: the likeliest, or one drawn with temperature from the nucleus."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.core.prng import named

_FLOAT_BITS = 31  # of a non-negative float32


class Sampling(NamedTuple):
    """How the next id is chosen; traced, so that other values need no other program.

    Attributes:
        temperature: 0 takes the likeliest id; otherwise logits are divided by it.
        top_p: in (0, 1]; only the likeliest ids whose probabilities together reach it can be drawn.
    """

    temperature: Any = 0.0
    top_p: Any = 1.0


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """The logits with all but the nucleus at minus infinity.

    The nucleus is the smallest set {i : p_i >= t} whose probability is at least top_p; ids of equal probability are in
    it together, and the likeliest id always is. The threshold t is found by bisecting the bits of a float32, which
    order non-negative floats: 31 sums over the vocabulary and no sort.

    Args:
        logits: already divided by the temperature.
        top_p: in (0, 1]; at 1 nothing is left out.
    Source: Holtzman et al. 2020, section 3.1.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.softmax(logits, axis=-1), jnp.int32)

    def narrow(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        inside = jnp.where(bits >= middle[:, None], bits, 0)
        enough = jnp.sum(jax.lax.bitcast_convert_type(inside, jnp.float32), axis=-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    highest = jnp.max(bits, axis=-1)
    low, _ = jax.lax.fori_loop(0, _FLOAT_BITS, narrow, (jnp.zeros_like(highest), highest + 1))
    return jnp.where((bits >= low[:, None]) | (jnp.asarray(top_p) >= 1.0), logits, -jnp.inf)


def choose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    key: Array,
    rows: Int[Array, "B"],
    positions: Int[Array, "B"],
) -> Int[Array, "B"]:
    """The next id of every row.

    Args:
        logits: of the next id.
        sampling: how to choose.
        key: random key of the whole generation.
        rows, positions: number of the prompt, and of the position to fill: what is drawn depends on these and the key,
            not on the batch or on how many ids were drawn before.
    """

    def draw(logits):
        keys = jax.vmap(lambda row, position: named(key, "sample", row, position))(rows, positions)
        kept = nucleus(logits / sampling.temperature, sampling.top_p)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def likeliest(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, draw, likeliest, logits)

"""Values that a rematerialised layer may keep for its backward pass, and bfloat16 moved about as bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def kept(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
    """x, under a name by which a policy of `jax.checkpoint` can have it kept.

    What is kept of a bfloat16 array are its bits, as integers. XLA's CPU backend has no bfloat16 of its own: to write
    one layer's array into those of all layers, it would convert all of them to float32 and back, for each layer.
    """
    return _bits_kept(x, name) if x.dtype == jnp.bfloat16 else checkpoint_name(x, name)


def bits(x: Array) -> Array:
    """An array as it is; of bfloat16 its bits, as integers.

    For what moves pieces of a large array: XLA's CPU backend, which has no bfloat16 of its own, would cut a piece out
    of one by converting all of it.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def floats(x: Array, dtype: Any) -> Array:
    """What `bits` made of an array of this dtype, as it was."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def kept_residual(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
    """`kept`, within the forward pass of a `jax.custom_vjp`, where nothing is differentiated any more.

    A policy does not look into functions with a gradient of their own, and `kept` is one.
    """
    return floats(checkpoint_name(bits(x), name), x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _bits_kept(x, name):
    return kept_residual(x, name)


@_bits_kept.defjvp
def _through(name, primals, tangents):
    return kept_residual(primals[0], name), tangents[0]

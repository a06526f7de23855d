"""Values that a rematerialised layer may keep for its backward pass."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def kept(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
    """x, under a name by which a policy of `jax.checkpoint` can have it kept.

    What is kept of a bfloat16 array are its bits, as integers. XLA's CPU backend has no bfloat16 of its own: to write
    one layer's array into those of all layers, it would convert all of them to float32 and back, for each layer.
    """
    return _bits_kept(name, x) if x.dtype == jnp.bfloat16 else checkpoint_name(x, name)


def _by_bits(name, x):
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


_bits_kept = jax.custom_jvp(_by_bits, nondiff_argnums=(0,))


@_bits_kept.defjvp
def _through(name, primals, tangents):
    return _by_bits(name, *primals), tangents[0]

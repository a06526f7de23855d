"""A digest of an array that is computed where the array lives.

The digest of x is a sum modulo 2^32 over its elements, counted in row-major order:

    sum_i mix(bits(x[i]) + i * 0x9E3779B9)

with `mix` the bijective 32-bit finaliser of MurmurHash3. One changed element always changes the sum; any other damage
escapes with probability 2^-32. Integer sums don't depend on the order, so a sharded array is summed shard by shard,
at the speed of the devices' memory, and the digest is the same on any mesh.

Source: A. Appleby, MurmurHash3 (fmix32).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def digests(leaves: Sequence[jax.Array]) -> list[int]:
    """Each leaf's digest, as the module's docstring defines it.

    Args:
        leaves: arrays of numbers or bools, of any shapes, each sharded as it likes.
    Returns:
        One integer below 2^32 a leaf. Waits for the arrays to be computed.
    """
    # One at a time: XLA's CPU backend runs out of threads, and hangs, when dozens of programs that sum over several
    # devices are under way at once. What it costs is a round trip for each leaf.
    return [int(_digest(leaf)) for leaf in leaves]


# One small program for each shape, of which a state has few, rather than one for the state, which has many leaves.
@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    width = leaf.dtype.itemsize
    # A type of eight bytes becomes two words along a new last axis, a narrower one is widened with zeros.
    bits = lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)).astype(
        jnp.uint32
    )
    # The index is summed from one iota an axis, not reshaped from one: a reshape would gather a sharded leaf.
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = functools.reduce(lambda product, n: product * n, bits.shape[axis + 1 :], 1) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(bits + index * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)

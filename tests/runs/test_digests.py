"""The digest: its formula, its independence of place, and no single change that it misses."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.runs.digests import digests


def test_one_flipped_bit_in_any_element_changes_the_digest():
    leaf = jax.random.normal(jax.random.key(0), (3, 5, 7))
    words = np.asarray(leaf).view(np.uint32)
    digest = digests([leaf])
    for place in np.ndindex(*leaf.shape):
        for bit in (0, 13, 31):
            changed = words.copy()
            changed[place] ^= np.uint32(1 << bit)
            assert digests([jnp.asarray(changed.view(np.float32))]) != digest
    swapped = words.copy()
    swapped[0, 0, 0], swapped[2, 4, 6] = words[2, 4, 6], words[0, 0, 0]
    assert digests([jnp.asarray(swapped.view(np.float32))]) != digest


def test_the_digest_is_the_documented_formula():
    def mix(word: int) -> int:
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        return word ^ (word >> 16)

    leaf = jax.random.normal(jax.random.key(1), (4, 3, 2))
    words = np.asarray(leaf).view(np.uint32).ravel().tolist()
    assert digests([leaf]) == [sum(mix((w + i * 0x9E3779B9) % 2**32) for i, w in enumerate(words)) % 2**32]


def test_the_digest_does_not_depend_on_where_the_array_lies():
    leaf = jax.random.normal(jax.random.key(2), (8, 16))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    for spec in (PartitionSpec("x", "y"), PartitionSpec("y"), PartitionSpec(None, ("x", "y"))):
        assert digests([jax.device_put(leaf, NamedSharding(mesh, spec)), leaf]) == digests([leaf, leaf])


def test_every_width_of_number_is_digested():
    for dtype in (jnp.bool_, jnp.int8, jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64):
        one = jnp.zeros((3, 2), dtype)
        assert digests([one]) != digests([one.at[1, 1].set(jnp.ones((), dtype))]), dtype

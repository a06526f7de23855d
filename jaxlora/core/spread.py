"""How the largest matrix is shared among devices without travelling."""

from typing import NamedTuple

import jax
from jax.sharding import NamedSharding


class Spread(NamedTuple):
    """Where products with the output embedding are computed on a mesh; `parallel.sharding.head_spread` makes it.

    Attributes:
        head: of the output embedding [V, D]: V over the devices that hold parts of it.
        tokens: of a chunk's inputs [B, C, ...]: all rows of the devices that share a head.
        logits: of a chunk's logits [B, C, V].
        rows: of what leaves, [B, C, ...]: as in the batch.
        words: parts that V is in.
        parts: parts that the logits are in.
    """

    head: NamedSharding
    tokens: NamedSharding
    logits: NamedSharding
    rows: NamedSharding
    words: int
    parts: int


def at(x: jax.Array, placement: jax.sharding.Sharding | None) -> jax.Array:
    """x, placed so inside a program; as the compiler likes where that is None."""
    return x if placement is None else jax.lax.with_sharding_constraint(x, placement)

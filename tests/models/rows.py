"""Rows of a batch as attention sees them, and what a program over them is made of."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxlora.models.places import Places


def packed(rows: int, time: int, *lengths: int) -> Places:
    """Rows of several examples one after the other, each row shifted by one, and padding behind them."""
    positions, segments = np.zeros((2, rows, time), np.int32)
    for row in range(rows):
        at = 0
        for number, length in enumerate((lengths[0] + row, *lengths[1:]), start=1):
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = number
            at += length
        assert at <= time
    return Places(jnp.asarray(positions), jnp.asarray(segments))


def drawn(rows, time, heads, width, dtype=jnp.float32, keys=None):
    """Random queries, keys and values, and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(time, heads[0]), (keys or time, heads[1]), (keys or time, heads[1]), (time, heads[0])]
    return [jnp.asarray(rng.normal(size=(rows, *shape, width)), dtype) for shape in shapes]


def equations(jaxpr: Any, primitive: str) -> Iterator[Any]:
    """Those of a primitive that are written down in it, within loops and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner), primitive)

"""The device mesh: `data` copies the base, `fsdp` and `tensor` cut it; `trial` parts a sweep's adapters."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlora.core.errors import InputError

AXES = ("data", "fsdp", "tensor")
TRIALS = "trial"
"""The axis of a sweep's adapters, before the others; each part of it has a base of its own."""


def make_mesh(sizes: Sequence[int], devices: Sequence[Any], trials: int = 1) -> Mesh:
    """Arranges devices as (data, fsdp, tensor), or as (trial, data, fsdp, tensor).

    Args:
        sizes: devices along each of `AXES`; one of them may be -1, "all the rest".
        devices: the devices to use, all of them.
        trials: parts in which a sweep's adapters are trained; likewise. 1 adds no axis.
    Returns:
        A mesh with the axes of `AXES`, and `TRIALS` before them where there are several.
    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    axes = AXES if trials == 1 else (TRIALS, *AXES)
    sizes = tuple(sizes) if trials == 1 else (trials, *sizes)
    shown = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(axes, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    free = [axis for axis, size in zip(axes, sizes, strict=True) if size == -1]
    if len(free) > 1:
        raise InputError(
            f"{shown}: only one axis can be -1 (all the rest); give {free[0]} or {free[1]} a number."
        )
    if len(devices) % known if free else known != len(devices):
        remedy = (
            "give each a divisor of that, and -1 to one" if free else "set mesh.data = -1 to use all the rest"
        )
        raise InputError(f"{shown} cannot be laid over {len(devices)} devices; {remedy}.")
    shape = [len(devices) // known if size == -1 else size for size in sizes]
    return Mesh(np.asarray(devices).reshape(shape), axes)

"""Frozen kernels in 8 or 4 bits: numbers of a code, times one scale for each block of inputs.

A kernel [I, O] is cut into blocks of up to `BLOCK` inputs of one output. A block keeps its largest magnitude as a
bfloat16 scale, and each of its values as the number of the nearest entry of a code: the whole numbers from -127 to 127
("int8"), or the sixteen quantiles of a normal distribution of NF4 ("nf4"), two to a byte. The layout is a kernel's own,
with fewer rows: whoever cuts a kernel over devices cuts `values` and `scales` alike.

Source: Dettmers et al. 2023 (QLoRA), section 3 and appendix E. The scales there are float32, or 8 bits of a second
quantisation; in bfloat16 they take 0.25 bits a value, between those two.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

BLOCK = 64
"""Inputs with one scale, where they divide; else the largest power of two that does."""

SMALLEST_BLOCK = 16
"""With fewer, the scales would outweigh what they scale."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of N(0, 1) over [-1, 1], eight above 0 and seven below it, and 0 itself."""


class Kind(NamedTuple):
    """A way of keeping values: their dtype, how many share a byte, and the code's largest entry."""

    dtype: Any
    packed: int
    largest: float


KINDS = {"int8": Kind(np.dtype(np.int8), 1, 127.0), "nf4": Kind(np.dtype(np.uint8), 2, 1.0)}
"""By the values of model.quantize that are not "none"."""

_BETWEEN = np.array([(low + high) / 2 for low, high in itertools.pairwise(NF4)], np.float32)
_AT_ONCE = 2**18  # values that are encoded at once: 1 MiB in float32


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["dtype", "together"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A kernel [..., I, O] that is kept in fewer bits; a leaf to `core.tree`, two arrays to JAX.

    Attributes:
        values: int8 [..., I, O], or uint8 [..., I / 2, O]: of a block's rows, the first half in the low four bits and
            the second half in the high ones.
        scales: bfloat16 [..., I / block, O].
        dtype: of the kernel that it stands for.
        together: where `gathered` puts one layer of it, if the mesh cuts layers.
    """

    values: Any
    scales: Any
    dtype: Any
    together: jax.sharding.Sharding | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for."""
        *layers, rows, outputs = self.values.shape
        packed = next(kind.packed for kind in KINDS.values() if kind.dtype == self.values.dtype)
        return (*layers, packed * rows, outputs)

    @property
    def size(self) -> int:
        """Values of the kernel that it stands for."""
        return math.prod(self.shape)


def block_of(inputs: int) -> int:
    """Inputs in a block of a kernel with so many of them."""
    return math.gcd(inputs, BLOCK)


def like(shape: tuple[int, ...], dtype: Any, kind: str) -> Quantised:
    """The `jax.ShapeDtypeStruct`s of a quantised kernel [..., I, O]."""
    *layers, inputs, outputs = shape
    rows = inputs // KINDS[kind].packed
    return Quantised(
        jax.ShapeDtypeStruct((*layers, rows, outputs), KINDS[kind].dtype),
        jax.ShapeDtypeStruct((*layers, inputs // block_of(inputs), outputs), jnp.bfloat16),
        jnp.dtype(dtype),
    )


def quantise(kernel: np.ndarray, kind: str) -> Quantised:
    """Quantises one kernel, some outputs at a time.

    |W - plain(quantise(W))| is at most scale / 2 with int8, and half a gap of the code times the scale with NF4 (and up
    to 1 / 256 of the scale more at the block's largest, whose scale was rounded). A block with a value that is not
    finite comes back as such.

    Args:
        kernel: [I, O], of any float dtype and in any memory order.
        kind: one of `KINDS`.
    Returns:
        NumPy arrays, for a kernel of this dtype.
    """
    inputs, outputs = kernel.shape
    block, found = block_of(inputs), like(kernel.shape, kernel.dtype, kind)
    values, scales = (np.empty(x.shape, x.dtype) for x in (found.values, found.scales))
    width = max(1, _AT_ONCE // inputs)
    for start in range(0, outputs, width):
        here = slice(start, start + width)
        # Splitting an axis copies nothing, whichever way round the kernel lies in memory.
        wide = kernel[:, here].astype(np.float32).reshape(inputs // block, block, -1)
        with np.errstate(invalid="ignore", over="ignore"):
            scale = (np.abs(wide).max(axis=1) / KINDS[kind].largest).astype(ml_dtypes.bfloat16)
            wide /= np.where(scale == 0, 1, scale).astype(np.float32)[:, None]
            codes = np.clip(np.rint(wide), -127, 127).astype(np.int8) if kind == "int8" else _nearest(wide)
        values[:, here] = codes.reshape(values.shape[0], -1)
        scales[:, here] = scale
    return Quantised(values, scales, found.dtype)


def _nearest(wide: np.ndarray) -> np.ndarray:
    """The numbers of the nearest entries of NF4, two to a byte: [blocks, block, O] -> [blocks, block / 2, O]."""
    codes = np.zeros_like(wide, np.uint8)
    for between in _BETWEEN:  # fifteen passes over what the cache holds, where a search would jump about
        codes += wide > between
    half = wide.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def gathered(kernel: Quantised) -> Quantised:
    """One layer's kernel, whole where it has to be for a product: the bits are sent, not what they stand for.

    The compiler by itself would have each device dequantise its own part, and send that: four times as much of NF4.
    """
    return kernel if kernel.together is None else jax.lax.with_sharding_constraint(kernel, kernel.together)


def plain(kernel: Array | Quantised) -> Float[Array, "..."]:
    """A kernel as an array [..., I, O] of its dtype; one that is not quantised is returned as it is."""
    if not isinstance(kernel, Quantised):
        return kernel
    *layers, blocks, outputs = kernel.scales.shape
    values = jnp.asarray(kernel.values).reshape(*layers, blocks, -1, outputs)
    scales = jnp.asarray(kernel.scales, jnp.float32)[..., None, :]
    if values.dtype == jnp.uint8:
        wide = _scaled_entries(jnp.concatenate([values & 15, values >> 4], axis=-2), scales)
    else:
        wide = values.astype(jnp.float32) * scales
    return wide.reshape(kernel.shape).astype(kernel.dtype)


def _scaled_entries(codes: Array, scales: Array) -> Array:
    """NF4[codes] * scales, by a tree of selections: a gather of single numbers is what TPUs are slowest at.

    What is selected are the entries of a block, already scaled. From the entries themselves, which are the same in
    every layer, `lax.scan` would make fifteen arrays of a kernel's size before the loop, and carry them through it.
    """
    found = [scales * entry for entry in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1) == 1
        found = [jnp.where(is_set, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]

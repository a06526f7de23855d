"""Frozen matrices in 8 or 4 bits: numbers of a code, times one scale for each block of inputs.

A kernel [I, O] is cut into blocks of up to `BLOCK` inputs of one output; a table of embeddings [V, D] into blocks of so
many of a word's D numbers, which are what the output embedding's products sum over. A block keeps its largest magnitude
as a bfloat16 scale, and each of its values as the number of the nearest entry of a code: the whole numbers from -127 to
127 ("int8"), or the sixteen quantiles of a normal distribution of NF4 ("nf4"), two to a byte. The layout is the
matrix's own, shorter along the blocks' axis: whoever cuts a kernel over devices cuts `values` and `scales` alike, and
whoever takes a table's rows takes those of both.

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
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jaxlora.core.spread import at

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
"""By the values of model.quantize and model.quantize_embeddings that are not "none"."""

KERNEL, TABLE = -2, -1
"""The axis of blocks: a kernel's inputs, a word's numbers."""

_BETWEEN = np.array([(low + high) / 2 for low, high in itertools.pairwise(NF4)], np.float32)
_AT_ONCE = 2**18  # values that are encoded at once: 1 MiB in float32
_WORDS_AT_ONCE = 1024


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["dtype", "axis", "together"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix that is kept in fewer bits; a leaf to `core.tree`, two arrays to JAX.

    Attributes:
        values: int8 of the matrix's shape, or uint8 of half its length along `axis`: of a block's numbers, the first
            half in the low four bits and the second half in the high ones. A kernel's [..., I, O] or [..., I / 2, O], a
            table's [..., D] or [..., D / 2].
        scales: bfloat16, one for each block: [..., I / block, O] or [..., D / block].
        dtype: of the matrix that it stands for.
        axis: along which blocks lie, `KERNEL` or `TABLE`. From the end, so that it is that of a slice of layers or of
            rows that were taken, too.
        together: where `gathered` puts one layer of it, if the mesh cuts layers.
    """

    values: Any
    scales: Any
    dtype: Any
    axis: int = KERNEL
    together: jax.sharding.Sharding | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return next(name for name, kind in KINDS.items() if kind.dtype == self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        return _with(self.values.shape, self.axis, KINDS[self.kind].packed * self.values.shape[self.axis])

    @property
    def size(self) -> int:
        """Values of the matrix that it stands for."""
        return math.prod(self.shape)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """A shape with another size along an axis."""
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


def block_of(inputs: int) -> int:
    """Inputs in a block, where there are so many."""
    return math.gcd(inputs, BLOCK)


def like(shape: tuple[int, ...], dtype: Any, kind: str, axis: int = KERNEL) -> Quantised:
    """The `jax.ShapeDtypeStruct`s of a quantised matrix of this shape."""
    inputs = shape[axis]
    return Quantised(
        jax.ShapeDtypeStruct(_with(shape, axis, inputs // KINDS[kind].packed), KINDS[kind].dtype),
        jax.ShapeDtypeStruct(_with(shape, axis, inputs // block_of(inputs)), jnp.bfloat16),
        jnp.dtype(dtype),
        axis,
    )


def quantise(matrix: np.ndarray, kind: str, axis: int = KERNEL) -> Quantised:
    """Quantises one matrix, some outputs (or words) at a time.

    |W - plain(quantise(W))| is at most scale / 2 with int8, and half a gap of the code times the scale with NF4 (and up
    to 1 / 256 of the scale more at the block's largest, whose scale was rounded). A block with a value that is not
    finite comes back as such.

    Args:
        matrix: a kernel [I, O] or a table [V, D], of any float dtype and in any memory order.
        kind: one of `KINDS`.
        axis: of blocks, `KERNEL` or `TABLE`.
    Returns:
        NumPy arrays, for a matrix of this dtype.
    """
    found = like(matrix.shape, matrix.dtype, kind, axis)
    found = dataclasses.replace(
        found,
        values=np.empty(found.values.shape, found.values.dtype),
        scales=np.empty(found.scales.shape, found.scales.dtype),
    )
    # What follows sees a kernel: a table is one that lies the other way round in memory.
    kernel, values, scales = (x if axis == KERNEL else x.T for x in (matrix, found.values, found.scales))
    inputs, outputs = kernel.shape
    block = block_of(inputs)
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
    return found


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


def plain(matrix: Array | Quantised) -> Float[Array, "..."]:
    """A matrix as an array of its dtype; one that is not quantised is returned as it is."""
    if not isinstance(matrix, Quantised):
        return matrix
    shape = matrix.scales.shape
    inside = len(shape) + matrix.axis + 1  # the axis within blocks, to come
    values = jnp.asarray(matrix.values).reshape(*shape[:inside], -1, *shape[inside:])
    scales = jnp.expand_dims(jnp.asarray(matrix.scales, jnp.float32), inside)
    if values.dtype == jnp.uint8:
        wide = _scaled_entries(jnp.concatenate([values & 15, values >> 4], axis=inside), scales)
    else:
        wide = values.astype(jnp.float32) * scales
    return wide.reshape(matrix.shape).astype(matrix.dtype)


def whole(
    table: Array | Quantised, placement: jax.sharding.NamedSharding | None = None, parts: int = 1
) -> Float[Array, "V D"]:
    """`plain` of a whole table inside a program, placed elsewhere: of a quantised one, the bits are sent.

    Some words at a time: a TPU keeps arrays in tiles of 128 numbers, so that each block of 64, and each half of it,
    takes room for 128. At once, the head of Qwen2.5-7B, 1.1 GB in bfloat16, took 3.2 GB of an evaluation.

    Args:
        table: values and scales [V, ...].
        placement: of the words; None for where they are. parts: that it cuts them into.
    """
    if not isinstance(table, Quantised):
        return at(table, placement)
    own, width = table.shape[0] // parts, table.shape[1]
    count = min(_WORDS_AT_ONCE, own)
    bits = jax.tree.map(lambda x: at(at(x, placement).reshape(parts, own, -1), placement), table)

    def put(i, found):
        start = jnp.minimum(i * count, own - count)  # the last of them may begin among those before
        some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, count, axis=1), bits)
        found = jax.lax.dynamic_update_slice_in_dim(found, plain(some), start, axis=1)
        if placement is not None:
            return found
        # As products take it. By itself, a TPU's compiler may lay it out the other way round, and copy it.
        return with_layout_constraint(found, Layout((0, 1, 2)))

    found = at(jnp.zeros((parts, own, width), table.dtype), placement)
    found = jax.lax.fori_loop(0, -(-own // count), put, found)
    return at(found.reshape(table.shape), placement)


def as_array(table: Array | Quantised) -> Float[Array, "V D"]:
    """`whole` of a table that lies on devices, outside of programs; the array lies as its bits do."""
    if not isinstance(table, Quantised):
        return table
    place = table.values.sharding
    parts = table.shape[0] // place.shard_shape(table.values.shape)[0]
    make = partial(whole, placement=place if parts > 1 else None, parts=parts)
    return jax.jit(make, out_shardings=place)(table)


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

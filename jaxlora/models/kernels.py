"""Attention by kernels that others keep: TPU splash attention (Pallas), and cuDNN's flash attention on NVIDIA GPUs.

Both, and `sparse.py`, see whole rows whose keys are the queries' own. Examples are contiguous within a row and
positions restart at each, so causal by index within a segment is causal by position, and the window likewise. Padding
is a segment as any other to them: it sees padding, nobody else sees it, and what comes out for it carries no loss.
"""

import functools
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlora.models.blockwise import pad_time
from jaxlora.models.sparse import sparse

_LANES = 128  # of a TPU's vector registers: rows are cut into blocks of multiples of it
_LARGEST_BLOCK = 512

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's primitive of cuDNN's forward pass, whose results are all that its backward pass needs beside q, k and v."""

Kernel = Callable[..., Array]
"""(q [B, T, H, h], k and v [B, T, K, h], segments [B, T]) -> [B, T, H, h]."""


def splash(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    segments: Int[Array, "B T"],
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H h"]:
    """Softmax attention by the Pallas kernel in `jax.experimental.pallas.ops.tpu.splash_attention`.

    Blocks that the causal or sliding mask forbids are not computed; memory is linear in T.

    Args:
        segments: example number within the row; 0 for padding.
        window: sliding window in tokens, or None.
        interpret: run the kernel's definition on any platform, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, heads, width = q.shape[1:]
    block = min(_LARGEST_BLOCK, -(-time // _LANES) * _LANES)
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v, segments = (pad_time(x, block) for x in (q, k, v, segments))
    shape = (q.shape[1], q.shape[1])
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    rows: Any = jax.vmap(kernel)(
        *(x.swapaxes(1, 2) for x in (q, k, v)), kernels.SegmentIds(segments, segments)
    )
    return rows.swapaxes(1, 2)[:, :time]


def cudnn(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    segments: Int[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T H h"]:
    """Softmax attention by cuDNN's flash attention, through `jax.nn.dot_product_attention`.

    That interface has no segments: they go in as a mask [B, 1, T, T], which cuDNN reads as a bias in q's dtype. It is
    the one array that is not linear in T: 2 T^2 bytes a row, where float32 scores would take 4 H T^2.

    Args:
        segments: example number within the row; 0 for padding.
        window: sliding window in tokens, or None.
    """
    time = q.shape[1]
    q, k, v, segments = (pad_time(x, 2) for x in (q, k, v, segments))  # with a bias, T has to be even
    same = segments[:, None, :, None] == segments[:, None, None, :]
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :time]


def cudnn_packed(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    segments: Int[Array, "B T"],
    stretches: int,
) -> Float[Array, "B T H h"]:
    """Softmax attention by cuDNN's flash attention over each example by itself, on Hopper GPUs.

    cuDNN is told where examples begin and how long they are: there is no mask, and nothing between examples is
    computed. `jax.nn.dot_product_attention` has no arguments for it; what it calls has, in a module that is JAX's own:
    where a version of JAX has moved it, `packed_is_there` says so, and a mask does it.

    Args:
        segments: example number within the row; 0 for padding.
        stretches: the most of them that a row has, padding counted: a row with more comes out wrong.
    """
    if q.size >= 2**31:  # places are counted in int32
        return cudnn(q, k, v, segments, None)
    from jax._src.cudnn import fused_attention_stablehlo as fused

    lengths, starts = _stretches(segments, stretches)
    out: Any = fused.dot_product_attention(
        q, k, v, None, None, lengths, lengths, starts, starts,
        scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip
    return out


@functools.cache
def packed_is_there() -> bool:
    """Whether this version of JAX has what `cudnn_packed` calls."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        return {"q_offsets", "kv_offsets", "mask_type"} <= inspect.signature(
            fused.dot_product_attention
        ).parameters.keys()
    except (ImportError, AttributeError, TypeError, ValueError):
        return False


def _stretches(segments: Int[Array, "B T"], most: int) -> tuple[Int[Array, "B S"], Int[Array, "B more"]]:
    """Lengths [B, S] of a row's stretches of one segment, and where they begin [B, S + 1]; -1 where there is none."""
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    number = jnp.cumsum(begins, axis=1)  # of the stretch that a position is in
    lengths = jnp.sum(number[:, None, :] == jnp.arange(most)[None, :, None], axis=-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    there = lengths > 0
    starts = jnp.pad(jnp.where(there, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(there, lengths, -1), starts


def sharded(kernel: Kernel, placement: NamedSharding | None) -> Kernel:
    """The kernel on each device's own rows and heads: the compiler cannot cut a kernel by itself.

    Args:
        kernel: computes whole rows.
        placement: of q [B, T, H, h], rows and heads; None for one device.
    """
    if placement is None or placement.mesh.size == 1:
        return kernel
    mesh = placement.mesh
    rows, _, heads, *_ = (*placement.spec, None, None, None)

    def cut(q, k, v, segments):
        shares = math.prod(
            mesh.shape[axis] for axis in (heads if isinstance(heads, tuple) else (heads,)) if axis
        )
        copies = _copies(q.shape[2], k.shape[2], shares)
        if copies is None:  # every device computes all heads of its rows
            by_head = PartitionSpec(rows)
        else:
            by_head = PartitionSpec(rows, None, heads)
            k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
        return jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(by_head, by_head, by_head, PartitionSpec(rows)),
            out_specs=by_head,
            check_vma=False,  # a kernel does not say over which axes its result varies
        )(q, k, v, segments)

    return cut


def _copies(heads: int, kv_heads: int, shares: int) -> int | None:
    """How often key heads have to be repeated so that shares of them go with shares of the query heads; None: never."""
    copies = shares // math.gcd(kv_heads, shares)
    return copies if heads % (kv_heads * copies) == 0 else None


def kernel(
    kind: str, window: int | None, placement: NamedSharding | None, interpret: bool, stretches: int | None
) -> Kernel:
    """What computes a kind ("sparse", "splash" or "cudnn") for whole rows, on as many devices as `placement` has."""
    if kind == "cudnn" and stretches is not None and window is None and packed_is_there():
        return sharded(partial(cudnn_packed, stretches=stretches), placement)
    chosen = {
        "sparse": partial(sparse, window=window),
        "splash": partial(splash, window=window, interpret=interpret),
        "cudnn": partial(cudnn, window=window),
    }
    return sharded(chosen[kind], placement)

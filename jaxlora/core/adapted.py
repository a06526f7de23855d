"""Products of one input with several frozen kernels and their adapters, forward and backward.

What the products share is made once: the queries', keys' and values' `x a` are one product, so is the gradient of their
`a`, and the gradient of x is summed in float32 over all of them before it is narrowed. Kernels stay apart: laid side by
side for one large product they would have to be copied for every layer and pass, which costs more than it saves
(docs/lab-notes.md, 2026-11-27).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlora.core.kept import kept_residual
from jaxlora.core.products import contract, transposed
from jaxlora.core.quantised import Quantised, gathered, plain


class Low(NamedTuple):
    """An adapter's matrices, in a dtype of their own."""

    a: Float[Array, "I R"]
    b: Float[Array, "R O"]


def adapted(
    x: Float[Array, "B T I"],
    kernels: Sequence[Float[Array, "I _"] | Quantised],
    adapters: Sequence[Low | None],
) -> list[Float[Array, "B T _"]]:
    """[x W_i (+ (x a_i) b_i)], multiplied in x's dtype and summed in float32.

    Args:
        x: the input; `x a` is rounded to its dtype.
        kernels: W_i. A quantised one is frozen, of x's dtype, and dequantised anew for every product.
        adapters: as many; ranks may differ. None for a kernel without one.
    Returns:
        float32. The gradients are those of the formula, of an adapter's matrices in their own dtype.
    Source: Hu et al. 2021 (LoRA), equation 3.
    """
    pairs = [(kernel, low) for kernel, low in zip(kernels, adapters, strict=True) if low is not None]
    made = iter(_adapted(x, *zip(*pairs, strict=True)) if pairs else ())
    return [
        contract("BTI,IO->BTO", x, kernel) if low is None else next(made)
        for kernel, low in zip(kernels, adapters, strict=True)
    ]


@jax.custom_vjp
def _adapted(x, kernels, adapters):
    return _forward(x, kernels, adapters)[0]


def _forward(x, kernels, adapters):
    low = _product("BTI,IR->BTR", x, _side_by_side(adapters, x.dtype))
    low = kept_residual(low.astype(x.dtype), "projection")
    out = [
        _product("BTI,IO->BTO", x, _plain(kernel, x.dtype))
        + _product("BTR,RO->BTO", part, adapter.b.astype(x.dtype))
        for kernel, adapter, part in zip(kernels, adapters, _by_rank(low, adapters), strict=True)
    ]
    return out, (x, kernels, adapters, low)


def _backward(residuals, cotangents):
    x, kernels, adapters, low = residuals
    cotangents = [cotangent.astype(x.dtype) for cotangent in cotangents]
    dlow = [
        _product("BTO,RO->BTR", cotangent, adapter.b.astype(x.dtype)).astype(x.dtype)
        for cotangent, adapter in zip(cotangents, adapters, strict=True)
    ]
    dlow = jnp.concatenate(dlow, axis=-1)
    dx = _product("BTR,IR->BTI", dlow, _side_by_side(adapters, x.dtype))
    for kernel, cotangent in zip(kernels, cotangents, strict=True):
        dx = dx + _product("BTO,IO->BTI", cotangent, _plain(kernel, x.dtype))
    da = _by_rank(transposed("BTR,BTI->RI", dlow, x).T, adapters)
    db = [
        _product("BTR,BTO->RO", part, cotangent)
        for part, cotangent in zip(_by_rank(low, adapters), cotangents, strict=True)
    ]
    dadapters = tuple(
        Low(a.astype(adapter.a.dtype), b.astype(adapter.b.dtype))
        for a, b, adapter in zip(da, db, adapters, strict=True)
    )
    dkernels = tuple(  # of no use to training, whose program leaves them out
        None if isinstance(kernel, Quantised) else _product("BTI,BTO->IO", x, cotangent).astype(kernel.dtype)
        for kernel, cotangent in zip(kernels, cotangents, strict=True)
    )
    return dx.astype(x.dtype), dkernels, dadapters


_adapted.defvjp(_forward, _backward)

_product: Any = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _plain(kernel: Any, dtype: Any) -> Array:
    return plain(gathered(kernel)) if isinstance(kernel, Quantised) else kernel.astype(dtype)


def _side_by_side(adapters: Sequence[Low], dtype: Any) -> Float[Array, "I R"]:
    """All a in one."""
    return jnp.concatenate([adapter.a.astype(dtype) for adapter in adapters], axis=1)


def _by_rank(x: Float[Array, "*N R"], adapters: Sequence[Low]) -> list[Float[Array, "*N _"]]:
    """What was made with all a, for each of them."""
    return jnp.split(x, np.cumsum([adapter.a.shape[1] for adapter in adapters])[:-1], axis=-1)

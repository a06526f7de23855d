"""Products of one input with several frozen kernels and their adapters, forward and backward.

What the products share is made once: the queries', keys' and values' `x a` are one product, so is the gradient of their
`a`, and where products hand out float32 the gradient of x is summed over all of them before it is narrowed.

Kernels stay apart: laid side by side for one large product they would have to be copied for every layer and pass, which
costs more than it saves on a CPU (docs/lab-notes.md, 2026-11-27). On a GPU a kernel is laid above its b, and the input
beside `x a`, where that is less to move than a second result of the products' size; where the input is the larger
array, a is laid beside the kernel, so that it is read once (docs/speed.md).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlora.core.kept import kept_residual
from jaxlora.core.products import WIDE, Products, contract, transposed
from jaxlora.core.quantised import Quantised, gathered, plain


class Low(NamedTuple):
    """An adapter's matrices, in a dtype of their own."""

    a: Float[Array, "I R"]
    b: Float[Array, "R O"]


def adapted(
    x: Float[Array, "B T I"],
    kernels: Sequence[Float[Array, "I _"] | Quantised],
    adapters: Sequence[Low | None],
    how: Products = WIDE,
) -> list[Float[Array, "B T _"]]:
    """[x W_i (+ (x a_i) b_i)], multiplied in x's dtype, each product summed in float32.

    Args:
        x: the input; `x a` is rounded to its dtype.
        kernels: W_i. A quantised one is frozen, of x's dtype, and dequantised anew for every product.
        adapters: as many; ranks may differ. None for a kernel without one.
        how: the products' results, and whether they may be joined.
    Returns:
        In the results' dtype. The gradients are those of the formula, of an adapter's matrices in their own
        dtype.
    Source: Hu et al. 2021 (LoRA), equation 3.
    """
    pairs = [(kernel, low) for kernel, low in zip(kernels, adapters, strict=True) if low is not None]
    made = iter(_adapted(x, *zip(*pairs, strict=True), how) if pairs else ())
    return [
        contract("BTI,IO->BTO", x, kernel, how.result) if low is None else next(made)
        for kernel, low in zip(kernels, adapters, strict=True)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _adapted(x, kernels, adapters, how):
    return _forward(x, kernels, adapters, how)[0]


def _forward(x, kernels, adapters, how):
    product = partial(jnp.einsum, preferred_element_type=how.result)
    a = _side_by_side(adapters, x.dtype)
    kernels_there = [_plain(kernel, x.dtype) for kernel in kernels]
    bs = [adapter.b.astype(x.dtype) for adapter in adapters]
    below = how.join and _pays(x, sum(b.shape[1] for b in bs))
    first = []
    if how.join and not below and _spares_a_pass(x, bs[0].shape[1]):
        # x W and x a as one product over the outputs of both: x, which is the larger array here, is read once.
        y, low = _parted(
            product("BTI,IO->BTO", x, jnp.concatenate([kernels_there[0], a], axis=1)), a.shape[1]
        )
        first = [y]
    else:
        low = product("BTI,IR->BTR", x, a)
    low = kept_residual(low.astype(x.dtype), "projection")
    if below:
        # x W + low b as one product over the inputs of both: the sums are made where they are written, once.
        joined, places = jnp.concatenate([x, low], axis=-1), np.cumsum([0, *(b.shape[0] for b in bs)])
        out = [
            product("BTI,IO->BTO", joined, _below(kernel, b, int(place), low.shape[-1]))
            for kernel, b, place in zip(kernels_there, bs, places[:-1], strict=True)
        ]
    else:
        plainly = first + [product("BTI,IO->BTO", x, kernel) for kernel in kernels_there[len(first) :]]
        out = [
            y + product("BTR,RO->BTO", part, b)
            for y, b, part in zip(plainly, bs, _by_rank(low, adapters), strict=True)
        ]
    return out, (x, kernels, adapters, low)


def _backward(how, residuals, cotangents):
    x, kernels, adapters, low = residuals
    product = partial(jnp.einsum, preferred_element_type=how.result)
    cotangents = [cotangent.astype(x.dtype) for cotangent in cotangents]
    kernels_there, a = [_plain(kernel, x.dtype) for kernel in kernels], _side_by_side(adapters, x.dtype)
    bs = [adapter.b.astype(x.dtype) for adapter in adapters]
    beside = how.join and len(kernels) == 1 and _pays(cotangents[0], x.shape[-1])
    back = [
        # Each cotangent's two products as one, which reads it once.
        _parted(product("BTO,IO->BTI", cotangent, jnp.concatenate([kernel, b])), b.shape[0])
        if how.join and not beside and _spares_a_pass(cotangent, x.shape[-1])
        else (None, product("BTO,RO->BTR", cotangent, b))
        for kernel, b, cotangent in zip(kernels_there, bs, cotangents, strict=True)
    ]
    dlow = jnp.concatenate([part.astype(x.dtype) for _, part in back], axis=-1)
    if beside:  # as forward
        joined = jnp.concatenate([*cotangents, dlow], axis=-1)
        dx = product("BTO,IO->BTI", joined, jnp.concatenate([*kernels_there, a], axis=1))
    else:
        dx = product("BTR,IR->BTI", dlow, a)
        for (part, _), kernel, cotangent in zip(back, kernels_there, cotangents, strict=True):
            dx = dx + (product("BTO,IO->BTI", cotangent, kernel) if part is None else part)
    da = _by_rank(transposed("BTR,BTI->RI", dlow, x).T, adapters)
    db = [
        _gradient("BTR,BTO->RO", part, cotangent)
        for part, cotangent in zip(_by_rank(low, adapters), cotangents, strict=True)
    ]
    dadapters = tuple(
        Low(a.astype(adapter.a.dtype), b.astype(adapter.b.dtype))
        for a, b, adapter in zip(da, db, adapters, strict=True)
    )
    dkernels = tuple(  # of no use to training, whose program leaves them out
        None if isinstance(kernel, Quantised) else _gradient("BTI,BTO->IO", x, cotangent).astype(kernel.dtype)
        for kernel, cotangent in zip(kernels, cotangents, strict=True)
    )
    return dx.astype(x.dtype), dkernels, dadapters


_adapted.defvjp(_forward, _backward)

_gradient: Any = partial(jnp.einsum, preferred_element_type=jnp.float32)
"""Of what is trained: in float32 whatever the products hand out."""


def _pays(x: Float[Array, "B T I"], outputs: int) -> bool:
    """Whether joining moves less than it saves.

    Joined, x and the kernels are copied; apart, the adapter's product is written, and read again to be added. Few
    tokens, as those that are generated, never pay for the copy of a kernel.
    """
    tokens, inputs = x.size // x.shape[-1], x.shape[-1]
    return inputs * (outputs + tokens) < tokens * outputs


def _spares_a_pass(x: Float[Array, "B T I"], outputs: int) -> bool:
    """Whether a kernel and an adapter's matrix, copied into one, cost less than to read x twice.

    The copy is read and written; x has a row for each token.
    """
    return 2 * outputs < x.size // x.shape[-1]


def _parted(x: Float[Array, "B T _"], ranks: int) -> tuple[Float[Array, "B T _"], Float[Array, "B T R"]]:
    """What a kernel made, and what the adapters' matrices did, of a product of both."""
    return x[..., :-ranks], x[..., -ranks:]


def _below(kernel: Array, b: Array, place: int, rows: int) -> Float[Array, "_ O"]:
    """A kernel, and below it so many rows, zero but for those of b from a place on."""
    return jnp.concatenate([kernel, jnp.pad(b, ((place, rows - place - b.shape[0]), (0, 0)))])


def _plain(kernel: Any, dtype: Any) -> Array:
    return plain(gathered(kernel)) if isinstance(kernel, Quantised) else kernel.astype(dtype)


def _side_by_side(adapters: Sequence[Low], dtype: Any) -> Float[Array, "I R"]:
    """All a in one."""
    return jnp.concatenate([adapter.a.astype(dtype) for adapter in adapters], axis=1)


def _by_rank(x: Float[Array, "*N R"], adapters: Sequence[Low]) -> list[Float[Array, "*N _"]]:
    """What was made with all a, for each of them."""
    return jnp.split(x, np.cumsum([adapter.a.shape[1] for adapter in adapters])[:-1], axis=-1)

"""Matrix products with low-precision operands and float32 sums, forward and backward.

`jnp.einsum(..., preferred_element_type=float32)` gives a float32 result from bfloat16 operands, but its gradient
multiplies a float32 cotangent with a bfloat16 operand, which XLA answers by widening the operand: slower everywhere
and, on a CPU, by a factor of two. Here the cotangent is narrowed instead, and every product of the step, whichever
its direction, is the same kind: narrow operands, float32 sums.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlora.core.quantised import Quantised, gathered, plain

GPUS = ("gpu", "cuda")
"""Of the platforms that `models.attention.Attention` knows."""


def contract(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."] | Quantised, result: Any = jnp.float32
) -> Float[Array, "..."]:
    """`einsum(equation, x, y)` with operands in x's dtype, float32 sums and, unless asked otherwise, a float32 result.

    Args:
        equation: an einsum of two operands, written out ("NI,IO->NO"). Every letter must stand in two of the three
            terms, so that each gradient is the einsum of the other two.
        x: first operand; its dtype is the one multiplied in.
        y: second operand, cast to x's dtype for the product. Its gradient comes back in its own dtype: a float32
            adapter under bfloat16 activations keeps a gradient that was summed and stored in float32. A quantised one
            is frozen, of x's dtype, and dequantised anew for every product, forward and backward.
        result: dtype that the sums are handed out in: float32 or x's (see `Products`).
    Returns:
        In that dtype, shaped as the equation says.
    """
    product = _contract_quantised if isinstance(y, Quantised) else _contract
    return product(equation, x, y, result)


class Products(NamedTuple):
    """How a decoder's products with its kernels are asked for; made by `products_of`.

    Attributes:
        result: dtype that they hand their float32 sums out in, where these are rounded next anyway.
        join: whether an adapter may be laid beside its kernel for one product of both (`core.adapted`).
    """

    result: Any = jnp.float32
    join: bool = False


WIDE = Products()
"""As on a CPU: float32 results, nothing joined."""


def products_of(platform: str, dtype: Any, join: bool = True) -> Products:
    """What suits a platform.

    On a CPU a product is fast only where it may hand out float32, and a TPU's compiler rounds within the product. A
    GPU's libraries write what they are asked for: float32 results would be written, and read again to be rounded, for
    as long as many a product takes.

    Args:
        platform: as `models.attention.Attention` has it. dtype: of the operands.
        join: False where kernels are cut over devices, or several adapters share them under `jax.vmap`.
    """
    return Products(dtype, join) if platform in GPUS else WIDE


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract(equation, x, y, result):
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=result)


def _forward(equation, x, y, result):
    return _contract(equation, x, y, result), (x, y)


def _backward(equation, result, operands, cotangent):
    x, y = operands
    x_term, y_term, out = _terms(equation)
    cotangent = cotangent.astype(x.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = jnp.einsum(f"{out},{y_term}->{x_term}", cotangent, y.astype(x.dtype), preferred_element_type=result)
    if (
        y.ndim == 2 and x.size > cotangent.size
    ):  # as that of A: its rows are long, and a cotangent's are of the rank
        dy = transposed(f"{out},{x_term}->{y_term[::-1]}", cotangent, x).T
    else:
        dy = product(f"{x_term},{out}->{y_term}", x, cotangent)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_contract.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract_quantised(equation, x, y, result):
    return _contract(equation, x, plain(gathered(y)), result)


def _forward_quantised(equation, x, y, result):
    # What is kept is the quantised kernel, which lives anyway: the array would be the whole base, layer by layer.
    return _contract_quantised(equation, x, y, result), y


def _backward_quantised(equation, result, y, cotangent):
    x_term, y_term, out = _terms(equation)
    cotangent = cotangent.astype(y.dtype)
    dx = jnp.einsum(f"{out},{y_term}->{x_term}", cotangent, plain(gathered(y)), preferred_element_type=result)
    return dx.astype(y.dtype), None


_contract_quantised.defvjp(_forward_quantised, _backward_quantised)


def transposed(equation: str, small: Float[Array, "..."], large: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product over the rows of both operands, whose result will be transposed: "NR,NI->RI".

    One operand of such a product has to be transposed in memory, and it is the first. The compiler, which sees the
    transposed result, would otherwise change their places.

    Args:
        equation: an einsum of two operands.
        small: the first operand.
        large: the second one.
    Returns:
        float32.
    """
    return jax.lax.optimization_barrier(
        jnp.einsum(equation, small, large, preferred_element_type=jnp.float32)
    )


def _terms(equation: str) -> tuple[str, str, str]:
    """The terms of "NI,IO->NO": NI, IO and NO."""
    inputs, out = equation.split("->")
    x_term, y_term = inputs.split(",")
    return x_term, y_term, out

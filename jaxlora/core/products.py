"""Matrix products with low-precision operands and float32 results, forward and backward.

`jnp.einsum(..., preferred_element_type=float32)` gives a float32 result from bfloat16 operands, but its gradient
multiplies a float32 cotangent with a bfloat16 operand, which XLA answers by widening the operand: slower everywhere
and, on a CPU, by a factor of two. Here the cotangent is narrowed instead, and every product of the step, whichever
its direction, is the same kind: narrow operands, float32 sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlora.core.quantised import Quantised, gathered, plain


def contract(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."] | Quantised
) -> Float[Array, "..."]:
    """`einsum(equation, x, y)` with operands in x's dtype and a float32 result.

    Args:
        equation: an einsum of two operands, written out ("NI,IO->NO"). Every letter must stand in two of the three
            terms, so that each gradient is the einsum of the other two.
        x: first operand; its dtype is the one multiplied in.
        y: second operand, cast to x's dtype for the product. Its gradient comes back in its own dtype: a float32
            adapter under bfloat16 activations keeps a gradient that was summed and stored in float32. A quantised one
            is frozen, of x's dtype, and dequantised anew for every product, forward and backward.
    Returns:
        float32, shaped as the equation says.
    """
    return _contract_quantised(equation, x, y) if isinstance(y, Quantised) else _contract(equation, x, y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(equation, x, y):
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(equation, x, y):
    return _contract(equation, x, y), (x, y)


def _backward(equation, operands, cotangent):
    x, y = operands
    x_term, y_term, out = _terms(equation)
    cotangent = cotangent.astype(x.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = product(f"{out},{y_term}->{x_term}", cotangent, y.astype(x.dtype))
    if (
        y.ndim == 2 and x.size > cotangent.size
    ):  # as that of A: its rows are long, and a cotangent's are of the rank
        dy = transposed(f"{out},{x_term}->{y_term[::-1]}", cotangent, x).T
    else:
        dy = product(f"{x_term},{out}->{y_term}", x, cotangent)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_contract.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract_quantised(equation, x, y):
    return _contract(equation, x, plain(gathered(y)))


def _forward_quantised(equation, x, y):
    # What is kept is the quantised kernel, which lives anyway: the array would be the whole base, layer by layer.
    return _contract_quantised(equation, x, y), y


def _backward_quantised(equation, y, cotangent):
    x_term, y_term, out = _terms(equation)
    cotangent = cotangent.astype(y.dtype)
    dx = jnp.einsum(
        f"{out},{y_term}->{x_term}", cotangent, plain(gathered(y)), preferred_element_type=jnp.float32
    )
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

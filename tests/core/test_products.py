"""Narrow operands, float32 sums, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.products import WIDE, contract, products_of

CASES = {
    "NI,IO->NO": ((5, 7), (7, 3)),
    "BTI,IO->BTO": ((2, 5, 7), (7, 3)),
    "BTKGh,BSKh->BKGTS": ((2, 5, 2, 3, 4), (2, 6, 2, 4)),
    "BKGTS,BSKh->BTKGh": ((2, 2, 3, 5, 6), (2, 6, 2, 4)),
}


@pytest.mark.parametrize("equation", CASES)
def test_value_and_gradients_are_those_of_einsum(equation):
    shapes = CASES[equation]
    x, y = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def total(product):
        return lambda x, y: jnp.sum(jnp.sin(product(equation, x, y)))

    np.testing.assert_allclose(contract(equation, x, y), jnp.einsum(equation, x, y), rtol=1e-6, atol=1e-6)
    ours = jax.grad(total(contract), argnums=(0, 1))(x, y)
    theirs = jax.grad(total(jnp.einsum), argnums=(0, 1))(x, y)
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 4), (4, 96)])
def test_no_gradient_transposes_the_larger_of_its_operands(inputs, outputs):
    """A gradient over rows is a product with one operand transposed: rows of 4, and not of 96."""
    x, y = jnp.ones((2, 64, inputs), jnp.bfloat16), jnp.ones((inputs, outputs), jnp.bfloat16)
    weigh = jnp.ones((2, 64, outputs), jnp.bfloat16)
    gradient = jax.grad(lambda y, x, w: jnp.sum(contract("BTI,IO->BTO", x, y) * w))
    text = jax.jit(gradient).lower(y, x, weigh).compile().as_text()
    moved = [
        line.split(" = ")[1].split("{")[0]
        for line in text.splitlines()
        if " copy(" in line or " transpose(" in line
    ]
    sizes = [int(np.prod([int(n) for n in shape.split("[")[1].rstrip("]").split(",")])) for shape in moved]
    assert sizes, "the small one was transposed"
    assert max(sizes) == 2 * 64 * 4


def test_bfloat16_operands_keep_a_float32_result_and_each_gradient_its_own_dtype():
    x = jax.random.normal(jax.random.key(0), (8, 32), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (32, 4), jnp.float32)
    assert contract("NI,IO->NO", x, y).dtype == jnp.float32
    dx, dy = jax.grad(lambda x, y: jnp.sum(contract("NI,IO->NO", x, y)), argnums=(0, 1))(x, y)
    assert (dx.dtype, dy.dtype) == (jnp.bfloat16, jnp.float32)


def test_every_product_of_the_backward_pass_has_narrow_operands():
    x, y = jnp.ones((8, 32), jnp.bfloat16), jnp.ones((32, 4), jnp.bfloat16)
    gradient = jax.grad(lambda x, y: jnp.sum(contract("NI,IO->NO", x, y) ** 2), argnums=(0, 1))
    products = [e for e in jax.make_jaxpr(gradient)(x, y).jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 2
    for product in products:
        assert {v.aval.dtype.name for v in product.invars} == {"bfloat16"}
        assert product.outvars[0].aval.dtype == jnp.float32


def test_a_result_is_narrow_where_a_platform_wants_it_so():
    assert [products_of(platform, jnp.bfloat16) for platform in ("cpu", "tpu")] == [WIDE] * 2
    assert [products_of(platform, jnp.bfloat16) for platform in ("gpu", "cuda")] == [(jnp.bfloat16, True)] * 2
    assert products_of("cuda", jnp.bfloat16, join=False) == (jnp.bfloat16, False)
    x, y = (jax.random.normal(jax.random.key(i), (8, 8), jnp.bfloat16) for i in (0, 1))
    narrow = contract("NI,IO->NO", x, y, jnp.bfloat16)
    np.testing.assert_array_equal(narrow, contract("NI,IO->NO", x, y).astype(jnp.bfloat16))

    def loss(result):
        return lambda x, y: jnp.sum(contract("NI,IO->NO", x, y, result).astype(jnp.float32) ** 2)

    ours, expected = (jax.grad(loss(dtype), argnums=(0, 1))(x, y) for dtype in (jnp.bfloat16, jnp.float32))
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert jnp.linalg.norm(mine - theirs) < 0.02 * jnp.linalg.norm(theirs)

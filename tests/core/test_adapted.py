"""Adapted products are the formula, forward and backward, and share what can be shared."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxlora.core.adapted import Low, adapted
from jaxlora.core.products import products_of
from jaxlora.core.quantised import Quantised, plain, quantise

INPUTS, OUTPUTS, RANKS = 16, (7, 3, 5), (2, 1, 4)


def drawn(dtype=jnp.float32, inputs=INPUTS, outputs=OUTPUTS, length=6):
    """An input, three kernels of different widths, and adapters of different ranks."""
    keys = iter(jax.random.split(jax.random.key(0), 10))
    x = jax.random.normal(next(keys), (2, length, inputs), dtype)
    kernels = [jax.random.normal(next(keys), (inputs, wide), dtype) for wide in outputs]
    lows = [
        Low(jax.random.normal(next(keys), (inputs, rank)), jax.random.normal(next(keys), (rank, wide)))
        for wide, rank in zip(outputs, RANKS, strict=False)
    ]
    return x, kernels, lows


def formula(x, kernels, lows):
    return [
        x @ kernel if low is None else x @ kernel + (x @ low.a) @ low.b
        for kernel, low in zip(kernels, lows, strict=True)
    ]


def gradients(compute, x, kernels, lows):
    def loss(x, kernels, lows):
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in compute(x, kernels, lows))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, kernels, lows)


@pytest.mark.parametrize("without", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_values_and_gradients_are_the_formulas(without):
    x, kernels, lows = drawn()
    lows = [None if i in without else low for i, low in enumerate(lows)]
    for mine, theirs in zip(adapted(x, kernels, lows), formula(x, kernels, lows), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    ours, expected = gradients(adapted, x, kernels, lows), gradients(formula, x, kernels, lows)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def agree(compute, x, frozen, kernels, lows):
    """Values, and gradients of what is not frozen, with kernels that stand for these."""
    for mine, theirs in zip(compute(x, frozen, lows), formula(x, kernels, lows), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)

    def loss(compute, kernels):
        return lambda x, lows: sum(jnp.sum(jnp.sin(y)) for y in compute(x, kernels, lows))

    ours = jax.grad(loss(compute, frozen), argnums=(0, 1))(x, lows)
    expected = jax.grad(loss(formula, kernels), argnums=(0, 1))(x, lows)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def frozen_and_whole(kernels, kind):
    """Quantised kernels, and the arrays that they stand for."""
    frozen = [quantise(np.asarray(kernel), kind) for kernel in kernels]
    assert all(isinstance(kernel, Quantised) for kernel in frozen)
    return frozen, [jnp.asarray(plain(kernel)) for kernel in frozen]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_kernel_is_what_it_stands_for(kind):
    x, kernels, lows = drawn()
    agree(adapted, x, *frozen_and_whole(kernels, kind), lows)


def test_bfloat16_sums_in_float32_and_gives_each_gradient_its_own_dtype():
    x, kernels, lows = drawn(jnp.bfloat16)
    wide = [x.astype(jnp.float32), [kernel.astype(jnp.float32) for kernel in kernels], lows]
    dx, _, dlows = gradients(adapted, x, kernels, lows)
    assert dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(dlows)} == {jnp.dtype(jnp.float32)}
    for mine, theirs in zip(
        jax.tree.leaves((dx, dlows)), jax.tree.leaves(gradients(formula, *wide)[::2]), strict=True
    ):
        assert np.linalg.norm(mine - theirs) < 0.05 * np.linalg.norm(theirs)


def test_what_the_products_share_is_one_product():
    """Three x a are one, three gradients of a, and three parts of that of x."""
    x, kernels, lows = drawn()

    def products(compute):
        def run(x, lows):
            out, back = jax.vjp(lambda x, lows: compute(x, kernels, lows), x, lows)
            return back(out)

        return jax.jit(run).lower(x, lows).as_text().count("dot_general")

    assert products(formula) == 3 * 8
    assert products(adapted) == 3 * 8 - 3 * 2


@pytest.mark.parametrize("outputs", [OUTPUTS, (24, 3, 5), (40,), (4,)], ids=str)
@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("length", [1, 64])
def test_a_gpus_products_are_the_formulas(outputs, kind, length):
    """Whether or not they are laid beside each other, by the tokens and by what is wider, input or output."""
    x, kernels, lows = drawn(outputs=outputs, length=length)
    frozen = kernels
    if kind != "none":
        frozen, kernels = frozen_and_whole(kernels, kind)
    agree(partial(adapted, how=products_of("gpu", jnp.float32)), x, frozen, kernels, lows)


def results(compute, x, kernels, lows):
    """The sizes of the products that a traced gradient makes, and the dtypes that they are handed out in."""
    made = traced_products(compute, x, kernels, lows)
    return [(one.outvars[0].aval.size, str(one.outvars[0].aval.dtype)) for one in made]


def traced_products(compute, x, kernels, lows):
    """The products of a traced gradient with respect to the input and the adapters: kernels are frozen."""

    def trained(x, lows):
        return gradients(compute, x, kernels, lows)[::2]

    return list(products_in(jax.make_jaxpr(trained)(x, lows).jaxpr))


def products_in(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products_in(getattr(inner, "jaxpr", inner))


def test_a_gpu_writes_no_wide_result_in_float32_and_none_for_an_adapter_alone():
    wide = (1024,)
    given = drawn(jnp.bfloat16, 16, wide, length=64)
    size = 2 * 64 * wide[0]
    on_cpu, on_gpu = (
        results(partial(adapted, how=products_of(platform, jnp.bfloat16)), *given)
        for platform in ("cpu", "gpu")
    )
    assert sorted(made for made in on_cpu if made[0] == size) == [(size, "float32")] * 2
    assert [made for made in on_gpu if made[0] == size] == [(size, "bfloat16")]
    # What is trained has its gradient in float32 everywhere.
    for made in (on_cpu, on_gpu):
        assert {(16 * RANKS[0], "float32"), (RANKS[0] * wide[0], "float32")} <= set(made)


@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 16), (16, 1024)], ids=["forward", "backward"])
def test_a_gpu_reads_what_is_wide_once_in_each_direction(inputs, outputs):
    """A wide input for x W and x a together, a wide cotangent for its products with W and b; and for a gradient."""
    given = drawn(jnp.bfloat16, inputs, (outputs,), length=64)
    size = 2 * 64 * 1024

    def reads(platform):
        made = traced_products(partial(adapted, how=products_of(platform, jnp.bfloat16)), *given)
        # Without the gradients of A and B, which sum over the tokens and have a place of their own.
        made = [one for one in made if one.outvars[0].aval.shape[:2] == (2, 64)]
        return sum(operand.aval.size >= size for one in made for operand in one.invars)

    assert (reads("cpu"), reads("gpu")) == (2, 1)


@pytest.mark.parametrize(("length", "copied"), [(1, False), (64, True)])
def test_a_kernel_is_not_copied_for_a_token_that_is_generated(length, copied):
    given = drawn(jnp.bfloat16, 16, (1024,), length=length)
    text = jax.jit(partial(adapted, how=products_of("gpu", jnp.bfloat16))).lower(*given).as_text()
    assert ("18x1024" in text) == copied, "the kernel's 16 rows above b's 2"


def test_a_gpu_is_hardly_less_exact():
    x, kernels, lows = drawn(jnp.bfloat16, 64, (256, 64, 64), length=256)
    wide = [x.astype(jnp.float32), [kernel.astype(jnp.float32) for kernel in kernels], lows]
    exact = jax.tree.leaves(gradients(formula, *wide)[::2])

    def error(platform):
        compute = partial(adapted, how=products_of(platform, jnp.bfloat16))
        found = jax.tree.leaves(gradients(compute, x, kernels, lows)[::2])
        return np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)])

    assert error("gpu") < 1.5 * error("cpu")

"""The chunked loss is the dense formula: values, gradients, metrics, masks; without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.training.losses import cross_entropy


def problem(rows=3, time=11, width=8, vocabulary=37, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (rows, time, width), dtype)
    unembed = jax.random.normal(keys[1], (vocabulary, width), dtype)
    targets = jax.random.randint(keys[2], (rows, time), 0, vocabulary)
    weights = (jax.random.uniform(keys[3], (rows, time)) > 0.4).astype(jnp.float32)
    return hidden, unembed, targets, weights


def dense(hidden, unembed, targets, weights, smoothing):
    """(objective, nll, correct) from whole logits, by the textbook."""
    logits = hidden.astype(jnp.float32) @ unembed.astype(jnp.float32).T
    log_probs = jax.nn.log_softmax(logits)
    onehot = jax.nn.one_hot(targets, logits.shape[-1])
    smooth = (1 - smoothing) * onehot + smoothing / logits.shape[-1]
    objective = -jnp.sum(weights[..., None] * smooth * log_probs)
    nll = -weights * jnp.sum(onehot * log_probs, axis=-1)
    return objective, nll, weights * (jnp.argmax(logits, axis=-1) == targets)


# Every new shape is a compilation, so the shapes are few and chosen: one token, a chunk larger than all, one that
# divides, one that does not, fewer tokens in a chunk than rows.
@pytest.mark.parametrize(
    ("rows", "time", "chunk"), [(1, 1, 8), (3, 11, 1000), (2, 12, 8), (3, 11, 7), (4, 5, 2)]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunked_is_dense(rows, time, chunk, smoothing):
    hidden, unembed, targets, weights = problem(rows, time)
    run = functools.partial(cross_entropy, chunk=chunk)
    (objective, losses), gradient = jax.value_and_grad(run, has_aux=True)(
        hidden, unembed, targets, weights, smoothing
    )
    expected, nll, correct = dense(hidden, unembed, targets, weights, smoothing)
    expected_gradient = jax.grad(lambda h: dense(h, unembed, targets, weights, smoothing)[0])(hidden)
    np.testing.assert_allclose(objective, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses.nll, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(losses.correct, correct)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_without_a_gradient_it_is_the_same():
    hidden, unembed, targets, weights = problem()
    alone = cross_entropy(hidden, unembed, targets, weights, 0.1, 8)
    (objective, losses), _ = jax.value_and_grad(cross_entropy, has_aux=True)(
        hidden, unembed, targets, weights, 0.1, 8
    )
    np.testing.assert_array_equal(alone[0], objective)
    np.testing.assert_array_equal(alone[1].nll, losses.nll)


def test_untrained_tokens_count_nothing_even_where_their_hidden_states_are_broken():
    hidden, unembed, targets, weights = problem()
    broken = jnp.where(weights[..., None] > 0, hidden, jnp.inf)
    objective, losses = cross_entropy(broken, unembed, targets, weights)
    np.testing.assert_allclose(objective, cross_entropy(hidden, unembed, targets, weights)[0], rtol=1e-6)
    assert np.isfinite(losses.nll).all()


def test_the_objective_scales_its_gradient():
    hidden, unembed, targets, weights = problem()
    once = jax.grad(lambda h: cross_entropy(h, unembed, targets, weights)[0])(hidden)
    thrice = jax.grad(lambda h: 3.0 * cross_entropy(h, unembed, targets, weights)[0])(hidden)
    np.testing.assert_allclose(thrice, 3.0 * once, rtol=1e-6)


def test_bfloat16_stays_within_its_rounding():
    hidden, unembed, targets, weights = problem(width=64, dtype=jnp.bfloat16)
    objective, _ = cross_entropy(hidden, unembed, targets, weights, 0.1)
    expected, _, _ = dense(hidden, unembed, targets, weights, 0.1)
    np.testing.assert_allclose(
        objective, expected, rtol=1e-5
    )  # operands are exact in float32, sums are float32
    gradient = jax.grad(lambda h: cross_entropy(h, unembed, targets, weights, 0.1)[0])(hidden)
    wide = jax.grad(lambda h: dense(h, unembed, targets, weights, 0.1)[0])(hidden.astype(jnp.float32))
    error = np.linalg.norm(gradient.astype(np.float32) - wide) / np.linalg.norm(wide)
    assert error < 2**-7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_memory_is_one_chunks_whatever_the_number_of_tokens(smoothing):
    vocabulary, width = 50_000, 32

    def temporary_bytes(time):
        shapes = (
            jax.ShapeDtypeStruct((1, time, width), jnp.float32),
            jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
            jax.ShapeDtypeStruct((1, time), jnp.int32),
            jax.ShapeDtypeStruct((1, time), jnp.float32),
        )
        loss = jax.grad(lambda h, u, t, w: cross_entropy(h, u, t, w, smoothing)[0])
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(512), temporary_bytes(4096)
    assert long < 4096 * vocabulary * 4 / 8  # an eighth of one dense float32 logits array
    assert long - short < 3 * (4096 - 512) * width * 4  # what grows is hidden states and their gradient


def test_smoothing_costs_no_memory():
    def temporary_bytes(smoothing):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem(2, 512, 32, 20_000)]
        loss = jax.grad(lambda h, u, t, w: cross_entropy(h, u, t, w, smoothing)[0])
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(0.1) <= 1.1 * temporary_bytes(0.0)

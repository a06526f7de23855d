"""The chunked loss is the dense formula whatever the sizes, the chunk, the mask, the smoothing and the split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.training.losses import cross_entropy

# Every shape is a compilation, so shapes are few, (B, T, V, D, chunk): a chunk that divides the time, one that does
# not, one that is larger than all, one smaller than the rows, a single token, a vocabulary of one.
SHAPES = (
    (2, 12, 37, 8, 8),
    (3, 11, 5, 4, 7),
    (1, 9, 130, 16, 1000),
    (4, 5, 37, 8, 2),
    (1, 1, 2, 1, 1),
    (2, 6, 1, 3, 4),
)


@functools.cache
def compiled(chunk: int):
    """(hidden, unembed, targets, weights, smoothing) -> ((objective, losses), gradient), compiled once a shape."""
    return jax.jit(jax.value_and_grad(functools.partial(cross_entropy, chunk=chunk), has_aux=True))


def run(problem, smoothing):
    """(objective, nll, correct, gradient) by chunks, as numpy arrays."""
    hidden, unembed, targets, weights, chunk = problem
    arrays = map(jnp.asarray, (hidden, unembed, targets, weights))
    (objective, losses), gradient = compiled(chunk)(*arrays, jnp.float32(smoothing))
    return jax.device_get((objective, losses.nll, losses.correct, gradient))


def dense(problem, smoothing):
    """(objective, nll, how far the target is above the likeliest other word, gradient) from whole logits, in float64.

    objective = - sum_n w_n sum_v q_v log softmax(z_n)_v,  q = (1 - s) onehot + s / V;  d/dz = w (softmax - q)
    """
    hidden, unembed, targets, weights = (np.asarray(x, np.float64) for x in problem[:4])
    logits = hidden @ unembed.T
    log_probs = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    onehot = np.arange(len(unembed)) == targets[..., None]
    wanted = (1 - smoothing) * onehot + smoothing / len(unembed)
    objective = -np.sum(weights[..., None] * wanted * log_probs)
    nll = -weights * np.sum(np.where(onehot, log_probs, 0.0), axis=-1)
    right = np.sum(np.where(onehot, logits, 0.0), axis=-1)
    ahead = right - np.max(np.where(onehot, -np.inf, logits), axis=-1)
    gradient = (weights[..., None] * (np.exp(log_probs) - wanted)) @ unembed
    return objective, nll, ahead, gradient


def rounding(problem) -> float:
    """What float32 may lose of a token's loss: a few roundings at the size of its largest sum of absolute terms."""
    hidden, unembed = (np.abs(x).astype(np.float64) for x in problem[:2])
    return 8 * 2.0**-24 * (1 + (hidden @ unembed.T).max() + np.log(len(unembed)))


@st.composite
def problems(draw, shapes=SHAPES):
    """(hidden, unembed, targets, weights, chunk): logits from all equal to saturated, masks from empty to full."""
    rows, time, vocabulary, width, chunk = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    hidden = (spread * rng.standard_normal((rows, time, width))).astype(np.float32)
    unembed = rng.standard_normal((vocabulary, width)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (rows, time)).astype(np.int32)
    kept = rng.random((rows, time)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    weights = kept * (rng.random((rows, time)) if draw(st.booleans()) else 1.0)
    return hidden, unembed, targets, weights.astype(np.float32), chunk


SMOOTHING = st.sampled_from([0.0, 0.1, 0.5]) | st.floats(0.0, 0.999)


@given(problems(), SMOOTHING)
def test_chunks_are_the_dense_formula(problem, smoothing):
    unembed, weights = problem[1], problem[3]
    objective, nll, correct, gradient = run(problem, smoothing)
    expected, expected_nll, ahead, expected_gradient = dense(problem, smoothing)
    error = rounding(problem)
    assert abs(objective - expected) <= error * weights.sum()
    assert (abs(nll - expected_nll) <= error * weights).all()
    # The likeliest word is told apart from the next only where rounding does not decide between them.
    assert (correct[ahead > error] == weights[ahead > error]).all()
    assert (correct[ahead < -error] == 0.0).all()
    assert (abs(gradient - expected_gradient) <= error * weights[..., None] * abs(unembed).max()).all()


@given(problems(), SMOOTHING, st.data())
def test_the_sums_of_a_masks_parts_add_up(problem, smoothing, data):
    """As micro-batches do, and devices: each token is counted by exactly one of them."""
    hidden, unembed, targets, weights, chunk = problem
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    owner = rng.integers(0, 3, weights.shape)
    masks = [np.where(owner == part, weights, np.float32(0)) for part in range(3)]
    whole = run(problem, smoothing)
    parts = [run((hidden, unembed, targets, mask, chunk), smoothing) for mask in masks]
    sums = [sum(values) for values in zip(*parts, strict=True)]
    np.testing.assert_allclose(sums[0], whole[0], rtol=1e-6, atol=rounding(problem) * weights.sum())
    for ours, expected in zip(sums[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(ours, expected)  # token by token nothing is summed: the same bits


@given(problems(shapes=[(4, 5, 37, 8, 2), (4, 5, 37, 8, 40)]), SMOOTHING)
def test_the_sums_of_a_batchs_rows_add_up(problem, smoothing):
    hidden, unembed, targets, weights, chunk = problem
    whole = run(problem, smoothing)
    rows = [
        run((hidden[b : b + 1], unembed, targets[b : b + 1], weights[b : b + 1], chunk), smoothing)
        for b in range(len(hidden))
    ]
    error = rounding(problem)
    assert abs(sum(row[0] for row in rows) - whole[0]) <= error * weights.sum()
    for ours, expected in zip(zip(*(row[1:] for row in rows), strict=True), whole[1:], strict=True):
        np.testing.assert_allclose(np.concatenate(ours), expected, rtol=1e-5, atol=error * abs(unembed).max())


@given(problems(), SMOOTHING, st.data())
def test_what_has_no_weight_contributes_exactly_nothing(problem, smoothing, data):
    """Whatever stands there: other states, words of the vocabulary, and numbers that are no words."""
    hidden, unembed, targets, weights, chunk = problem
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    masked = weights == 0
    garbage = rng.choice([-(2**31), -100, -1, 0, len(unembed) - 1, len(unembed), 2**31 - 1], weights.shape)
    other_targets = np.where(masked, garbage, targets).astype(np.int32)
    loud = (1e4 * rng.standard_normal(hidden.shape)).astype(np.float32)
    other_hidden = np.where(masked[..., None], loud, hidden)
    clean = run(problem, smoothing)
    spoilt = run((other_hidden, unembed, other_targets, weights, chunk), smoothing)
    for ours, expected in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(ours, expected)
    for values in spoilt[1:]:
        assert not values[masked].any()

"""The chunked loss is the dense formula: values, gradients, metrics, masks; without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.compilation import compiler_options
from jaxlora.training import losses as losses_module
from jaxlora.training.losses import CHUNK, cross_entropy, token_metrics


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
@pytest.mark.parametrize("one_pass", [False, True])
def test_chunked_is_dense(rows, time, chunk, smoothing, one_pass):
    hidden, unembed, targets, weights = problem(rows, time)
    run = functools.partial(cross_entropy, chunk=chunk, one_pass=one_pass)
    (objective, losses), gradient = jax.value_and_grad(run, has_aux=True)(
        hidden, unembed, targets, weights, smoothing
    )
    expected, nll, correct = dense(hidden, unembed, targets, weights, smoothing)
    expected_gradient = jax.grad(lambda h: dense(h, unembed, targets, weights, smoothing)[0])(hidden)
    np.testing.assert_allclose(objective, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses.nll, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(losses.correct, correct)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_one_pass_finds_what_two_find(scale):
    """However far apart logits lie."""
    logits = scale * jax.random.normal(jax.random.key(3), (5, 4001))
    top, total = jax.jit(losses_module._top_and_total)(logits)
    np.testing.assert_array_equal(top, logits.max(axis=-1))
    exact = np.sum(np.exp(np.asarray(logits, np.float64) - np.asarray(top, np.float64)[:, None]), axis=-1)
    bound = logits.shape[-1] * np.finfo(np.float32).eps  # of a sum of positive numbers in any order
    np.testing.assert_allclose(total, exact, rtol=bound)


@pytest.mark.parametrize(
    ("platform", "training", "evaluating", "one_pass"),
    [
        ("cpu", 128, 128, False),
        ("tpu", 512, 128, False),
        ("gpu", 1024, 1024, True),
        ("cuda", 1024, 1024, True),
    ],
)
def test_each_platform_takes_its_own_chunks(platform, training, evaluating, one_pass):
    assert losses_module.chunks_for(platform) == (training, one_pass)
    assert losses_module.chunks_for(platform, evaluating=True).size == evaluating
    for alone in (False, True):  # several adapters share what is read
        assert losses_module.chunks_for(platform, stacked=True, evaluating=alone).size == CHUNK


def test_without_a_gradient_it_is_the_same():
    hidden, unembed, targets, weights = problem()
    chunk = 24  # whole vectors: XLA's logarithm of what is left over may differ in its last bit
    alone = cross_entropy(hidden, unembed, targets, weights, 0.1, chunk)
    (objective, losses), _ = jax.value_and_grad(cross_entropy, has_aux=True)(
        hidden, unembed, targets, weights, 0.1, chunk
    )
    np.testing.assert_array_equal(alone[0], objective)
    np.testing.assert_array_equal(alone[1].nll, losses.nll)


def test_untrained_tokens_count_nothing_even_where_their_hidden_states_are_broken():
    hidden, unembed, targets, weights = problem()
    broken = jnp.where(weights[..., None] > 0, hidden, jnp.inf)
    objective, losses = cross_entropy(broken, unembed, targets, weights)
    np.testing.assert_allclose(objective, cross_entropy(hidden, unembed, targets, weights)[0], rtol=1e-6)
    assert np.isfinite(losses.nll).all()


@pytest.mark.parametrize(("trained", "chunks"), [(0, 0), (1, 1), (8, 1), (9, 2), (40, 5)])
def test_tokens_without_a_weight_meet_no_head(monkeypatch, trained, chunks):
    """Wherever they stand in their rows: so many chunks of 8 tokens are multiplied as the trained ones fill."""
    made: list[int] = []
    whole = losses_module._logits

    def counted(h, head, spread):
        jax.debug.callback(lambda: made.append(len(h)))
        return whole(h, head, spread)

    monkeypatch.setattr(losses_module, "_logits", counted)
    hidden, unembed, targets, _ = problem(4, 10)
    weights = np.zeros(40, np.float32)
    weights[np.random.default_rng(0).permutation(40)[:trained]] = 1.0
    run = functools.partial(cross_entropy, weights=jnp.asarray(weights).reshape(4, 10), chunk=8)
    (objective, _), gradient = jax.value_and_grad(run, has_aux=True)(hidden, unembed, targets)
    jax.effects_barrier()
    assert made == [8] * chunks
    assert np.count_nonzero(np.any(gradient != 0, axis=-1)) == trained
    expected = dense(hidden, unembed, targets, weights.reshape(4, 10), 0.0)[0]
    np.testing.assert_allclose(objective, expected, rtol=1e-5, atol=1e-5)


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


@pytest.mark.usefixtures("usual_fusions")
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


@pytest.mark.usefixtures("usual_fusions")
def test_a_chunk_has_its_logits_once():
    """In float32, and their slope in bfloat16: exponentials take the logits' place (on a CPU, as the step asks)."""
    rows, time, vocabulary, width = 4, 256, 50_000, 32
    shapes = (
        jax.ShapeDtypeStruct((rows, time, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, time), jnp.int32),
        jax.ShapeDtypeStruct((rows, time), jnp.float32),
    )
    loss = jax.jit(jax.value_and_grad(cross_entropy, has_aux=True))
    compiled = loss.lower(*shapes).compile(compiler_options=compiler_options("cpu"))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.05 * CHUNK * vocabulary * (4 + 2)


@pytest.mark.usefixtures("usual_fusions")
def test_smoothing_costs_no_memory():
    def temporary_bytes(smoothing):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem(2, 512, 32, 20_000)]
        loss = jax.grad(lambda h, u, t, w: cross_entropy(h, u, t, w, smoothing)[0])
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(0.1) <= 1.1 * temporary_bytes(0.0)


# ---- what an evaluation reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "chunk"), [(37, 7), (96, 1000)])
def test_token_metrics_are_the_dense_ones(vocabulary, chunk):
    """In float64, with top-5 by sorting; a vocabulary that fills the groups of `_sums`, and one that does not."""
    hidden, unembed, targets, weights = problem(vocabulary=vocabulary)
    logits = np.einsum("btd,vd->btv", *(np.asarray(x, np.float64) for x in (hidden, unembed)))
    for place, rank in ((0, 1), (1, 5), (2, 6)):  # every fourth target is likeliest, fifth, sixth
        chosen = np.argsort(-logits, axis=-1)[:, place::4, rank - 1]
        targets = targets.at[:, place::4].set(chosen)
    found = token_metrics(hidden, unembed, targets, weights, chunk)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    targets, weights = np.asarray(targets), np.asarray(weights)
    right = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    five = np.argsort(-logits, axis=-1)[..., :5]
    expected = {
        "nll": -np.log(right),
        "correct": five[..., 0] == targets,
        "top5": (five == targets[..., None]).any(-1),
        "entropy": -(p * np.log(p)).sum(-1),
        "confidence": p.max(-1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value * weights, rtol=2e-5, atol=2e-6, err_msg=name)
    assert 0 < np.sum(found.correct) < np.sum(found.top5) < np.sum(weights)


def test_a_small_nll_is_not_lost_beside_a_large_vocabulary():
    """One word is all but certain, and stands first; 150,000 improbable ones share what is left."""
    logits = np.random.default_rng(0).normal(size=151_936).astype(np.float32)
    logits[0] = 18.0
    one = (
        jnp.ones((1, 1, 1), jnp.float32),
        jnp.asarray(logits)[:, None],
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1, 1)),
    )
    found = token_metrics(*one)
    shifted = logits.astype(np.float64) - 18
    total = np.exp(shifted).sum()
    assert 1e-3 < np.log(total) < 1e-2
    np.testing.assert_allclose(found.nll[0, 0], np.log(total), atol=2e-6)  # the rounding of an lse of 18
    np.testing.assert_allclose(found.confidence[0, 0], 1 / total, rtol=2e-6)
    entropy = np.log(total) - (np.exp(shifted) * shifted).sum() / total
    np.testing.assert_allclose(found.entropy[0, 0], entropy, rtol=1e-5)


def test_equal_logits_are_not_above_each_other():
    hidden, unembed = jnp.ones((1, 2, 4)), jnp.zeros((40, 4))
    found = token_metrics(hidden, unembed, jnp.array([[3, 39]]), jnp.ones((1, 2)))
    assert found.correct.tolist() == found.top5.tolist() == [[1.0, 1.0]]
    np.testing.assert_allclose(found.entropy, np.log(40), rtol=1e-6)


@pytest.mark.usefixtures("usual_fusions")
def test_all_metrics_are_made_in_the_pass_that_makes_the_loss():
    """No array of a chunk's logits is written beyond those of the loss alone, and none is read more often but once."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem(2, 256, 32, 32_768)]

    def compiled(function):
        program = jax.jit(function).lower(*shapes).compile()
        cost = program.cost_analysis()
        return program.memory_analysis().temp_size_in_bytes, cost["bytes accessed"]

    loss, everything = compiled(lambda *x: jnp.sum(cross_entropy(*x)[1].nll)), compiled(token_metrics)
    assert everything[0] <= 1.1 * loss[0]
    assert everything[1] <= 1.2 * loss[1]

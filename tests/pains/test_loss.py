"""Pains of the loss: what it is worth must not depend on how it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.data.batches import EvalBatches
from jaxlora.lora import tree as lora
from jaxlora.models.decoder import unembedding
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.evaluate import Evaluator
from jaxlora.training.losses import CHUNK, cross_entropy
from jaxlora.training.step import make_eval_step


def dense(hidden, unembed, targets, weights, smoothing=0.0):
    """(objective, nll, correct) from whole logits."""
    log_probs = jax.nn.log_softmax(hidden @ unembed.T)
    onehot = jax.nn.one_hot(targets, unembed.shape[0])
    smooth = (1 - smoothing) * onehot + smoothing / unembed.shape[0]
    objective = -jnp.sum(weights[..., None] * smooth * log_probs)
    nll = -weights * jnp.sum(onehot * log_probs, axis=-1)
    return objective, nll, weights * (jnp.argmax(log_probs, axis=-1) == targets)


def test_switching_the_memory_saving_loss_on_silently_changes_or_breaks_metrics(make_tiny):
    """every metric from chunks equals the same metric from dense logits to float32 rounding"""
    tiny = make_tiny()
    batch = tiny.batch(0, rows=4, time=100)
    assert batch["tokens"].size > 3 * CHUNK  # more than one chunk, and a last one that is not full
    variables = {"params": tiny.base, "lora": lora.scale(tiny.state.adapter, 2.0)}
    inputs = (jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments"))
    hidden = jax.jit(tiny.decoder.apply)(variables, *inputs)
    likeliest = np.argmax(hidden @ unembedding(tiny.base).T, axis=-1)
    batch["targets"][:, ::3] = likeliest[:, ::3]  # some are right
    _, nll, correct = dense(hidden, unembedding(tiny.base), batch["targets"], batch["weights"])
    chunked = jax.jit(make_eval_step(tiny.decoder))(lora.scale(tiny.state.adapter, 2.0), tiny.base, batch)
    np.testing.assert_allclose(chunked.nll, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(chunked.correct, correct)
    logits = np.asarray(hidden @ unembedding(tiny.base).T, np.float64)
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    five = np.argsort(-logits, axis=-1)[..., :5]
    for name, value in {
        "top5": (five == batch["targets"][..., None]).any(-1),
        "entropy": -(p * np.log(p)).sum(-1),
        "confidence": p.max(-1),
    }.items():
        np.testing.assert_allclose(getattr(chunked, name), value * batch["weights"], rtol=1e-5, atol=1e-6)
    assert 0.2 < float(chunked.correct.sum()) / float(batch["weights"].sum()) < 0.8


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_crashes_or_ignores_masks(smoothing):
    """chunked smoothed loss = dense formula, masks respected, peak memory within 10 % of no smoothing"""
    draw = np.random.default_rng(0)
    hidden, unembed = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((3, 70, 8), (41, 8)))
    targets = jnp.asarray(draw.integers(0, 41, (3, 70)), jnp.int32)
    weights = jnp.asarray(draw.random((3, 70)) < 0.5, jnp.float32)

    def value(loss, x=hidden, w=weights):
        return jax.value_and_grad(lambda h: loss(h, unembed, targets, w, smoothing)[0])(x)

    (ours, gradient), (expected, expected_gradient) = value(cross_entropy), value(dense)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    # What is masked can be anything: neither the loss nor another token's gradient feels it.
    spoilt = jnp.where(weights[..., None] > 0, hidden, 100.0)
    again, gradient_again = value(cross_entropy, spoilt)
    np.testing.assert_array_equal(again, ours)
    np.testing.assert_array_equal(gradient_again, gradient)
    assert not gradient[weights == 0].any()


def test_loss_is_n_times_too_large_under_gradient_accumulation(make_tiny, train_step):
    """(batch 8, 1 micro-batch) and (8 micro-batches of 1), with ragged masks and any smoothing, give the same
    gradient
    """
    for smoothing in (0.0, 0.1, 0.9):
        tiny = make_tiny(label_smoothing=smoothing, clip_norm=float("inf"))
        (whole, sums), (pieces, parts) = (
            train_step(tiny.state, tiny.base, tiny.batch(0, 8, 16, micro_batches)) for micro_batches in (1, 8)
        )
        # Without clipping, Adam's moments after a first step are the gradient and its square, times constants.
        for mine, theirs in zip(jax.tree.leaves(pieces.moments), jax.tree.leaves(whole.moments), strict=True):
            assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)
        np.testing.assert_allclose(parts.rows_nll.reshape(-1), sums.rows_nll.reshape(-1), rtol=1e-5)
        np.testing.assert_allclose(parts._replace(rows_nll=0.0), sums._replace(rows_nll=0.0), rtol=1e-5)
        assert float(sums.grad_norm) > 1e-3


def test_eval_loss_depends_on_eval_batch_size(make_tiny, drawn):
    """eval/nll is identical to 1e-5 for every batch size, packed or not, on 1 or 8 devices"""
    tiny, length = make_tiny(), 24
    examples = drawn(13, length)
    mesh = make_mesh((8, 1, 1), jax.devices())
    over_eight = tiny.decoder.clone(activation_sharding=sharding.activation_sharding(mesh))
    one, eight = (
        (jax.jit(make_eval_step(tiny.decoder)), tiny.base, jax.device_put),
        (
            jax.jit(make_eval_step(over_eight)),
            jax.device_put(tiny.base, sharding.tree_shardings(mesh, tiny.base)),
            lambda batch: jax.device_put(batch, sharding.batch_sharding(mesh, micro_batches=False)),
        ),
    )
    found = []
    for rows, packing, (step, base, put) in (
        (1, True, one), (1, False, one), (3, True, one), (5, False, one), (8, True, eight), (16, False, eight),
    ):  # fmt: skip
        data = EvalBatches(examples, rows, length, packing=packing)
        found.append(
            Evaluator(step, data, put, ("nll",))(lora.scale(tiny.state.adapter, 2.0), base).metrics[
                "eval/nll"
            ]
        )
    np.testing.assert_allclose(found, found[0], rtol=1e-5)
    # The examples differ so much in loss and in weight that the mean of their means is another number.
    alone = Evaluator(one[0], EvalBatches(examples, 1, length, packing=False), one[2], ("nll",))
    assert (
        abs(np.mean(alone(lora.scale(tiny.state.adapter, 2.0), tiny.base).per_example["nll"]) / found[0] - 1)
        > 1e-3
    )


def test_runs_with_label_smoothing_look_worse_and_cant_be_compared(
    finished, fine_tune, one_step, lines, tmp_path
):
    """eval/nll is never smoothed"""
    data = finished.workdir.with_name("train.jsonl")
    fine_tune(tmp_path / "run", optim__label_smoothing=0.9, data__train=data, **one_step)
    plain, smoothed = (
        {f"{key} at {line['step']}": value for line in lines(workdir) for key, value in line.items()}
        for workdir in (finished.workdir, tmp_path / "run")
    )
    for key in ("eval/nll at 0", "train/nll at 1"):  # after that, another objective has moved the adapter
        assert smoothed[key] == pytest.approx(plain[key], rel=1e-5), key
    assert plain["train/loss at 1"] == pytest.approx(plain["train/nll at 1"], rel=1e-6)
    assert abs(smoothed["train/loss at 1"] - smoothed["train/nll at 1"]) > 0.1

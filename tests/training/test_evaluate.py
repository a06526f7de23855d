"""An evaluation's numbers do not depend on how its examples are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.data.batches import EvalBatches, Examples
from jaxlora.lora import tree as lora
from jaxlora.models.decoder import unembedding
from jaxlora.training.evaluate import Evaluator
from jaxlora.training.step import make_eval_step

LENGTH = 24


@pytest.fixture(scope="module")
def examples():
    """Thirteen examples of 4 to 20 ids, each with another share of trained tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 21, 13)
    trained = [draw.random(n) < 0.6 for n in lengths]
    for mask in trained:
        mask[-1] = True
    return Examples(
        ids=draw.integers(0, 72, lengths.sum()).astype(np.int32),
        trained=np.concatenate(trained),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source_rows=np.arange(13, dtype=np.int64),
        conversations=13,
        truncated=0,
        dropped=0,
        max_length=LENGTH,
        name="drawn",
    )


@pytest.fixture(scope="module")
def dense(make_tiny, examples):
    """nll sums, hits and weights by example, each alone in a row, from whole logits."""
    tiny = make_tiny()
    adapter = lora.scale(tiny.state.adapter, 2.0)

    @jax.jit
    def logits_of(ids):
        positions = jnp.arange(LENGTH)[None]
        # Padding on the right is invisible to what comes before it, so one shape serves all lengths.
        hidden = tiny.decoder.apply(
            {"params": tiny.base, "lora": adapter}, ids[None], positions, jnp.ones_like(positions)
        )
        return (hidden @ unembedding(tiny.base).T)[0]

    rows = []
    for e in range(len(examples)):
        ids, trained = examples[e]
        log_probs = jax.nn.log_softmax(logits_of(np.pad(ids, (0, LENGTH - len(ids)))))[: len(ids) - 1]
        nll = -np.take_along_axis(np.asarray(log_probs), ids[1:, None], 1)[:, 0]
        hits = np.argmax(log_probs, -1) == ids[1:]
        rows.append((nll[trained[1:]].sum(), hits[trained[1:]].sum(), trained[1:].sum()))
    return np.array(rows, np.float64)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_layout_gives_the_dense_numbers(make_tiny, examples, dense, batch_size, packing):
    tiny = make_tiny()
    batches = EvalBatches(examples, batch_size, LENGTH, packing=packing)
    step = jax.jit(make_eval_step(tiny.decoder))
    evaluator = Evaluator(step, batches, jax.device_put, ("nll", "perplexity", "token_accuracy"))
    seen = []
    found = evaluator(
        lora.scale(tiny.state.adapter, 2.0), tiny.base, lambda done, total: seen.append((done, total))
    )

    nll, hits, weight = dense.sum(axis=0)
    assert found.metrics["nll"] == pytest.approx(nll / weight, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(np.exp(nll / weight), rel=1e-4)
    assert found.metrics["token_accuracy"] == hits / weight
    assert found.per_example["example"] == list(range(13))
    assert found.per_example["tokens"] == dense[:, 2].astype(int).tolist()
    np.testing.assert_allclose(found.per_example["nll"], dense[:, 0] / dense[:, 2], rtol=1e-5)
    assert seen == [(i + 1, batches.num_batches) for i in range(batches.num_batches)]
    assert step._cache_size() == 1

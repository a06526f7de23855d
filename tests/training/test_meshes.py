"""Training, evaluation and answers on 2, 4 and 8 simulated devices give the single device's numbers, in every mesh."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxlora.lora import tree as lora
from jaxlora.models.decoding import Sampling, answer_batch, left_pad
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rows import placed
from jaxlora.training.step import make_eval_step, make_train_step

QUICK = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
SHAPES = [
    (data, fsdp, count // data // fsdp)
    for count in (2, 4, 8)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if count % (data * fsdp) == 0
]


def answers(decoder, cache_sharding=None):
    return jax.jit(partial(answer_batch, decoder, max_new_tokens=6, cache_sharding=cache_sharding))


def prompts():
    """Eight prompts of different lengths, and what `answer_batch` takes after them, but for the key."""
    draw = np.random.default_rng(2)
    tokens, padding = left_pad([draw.integers(0, 72, n).astype(np.int32) for n in range(3, 11)])
    return tokens, padding, np.array([-1], np.int32), Sampling(np.float32(0), np.float32(1))


@pytest.fixture(scope="module")
def alone(make_tiny):
    """Two steps, an evaluation and answers on one device."""
    tiny = make_tiny()
    step = jax.jit(make_train_step(tiny.decoder))
    state, batch = tiny.state, tiny.batch(0, 16, 16, 2)
    for _ in range(2):
        state, sums = step(state, tiny.base, batch)
    adapter = lora.scale(state.adapter, 2.0)
    losses = jax.jit(make_eval_step(tiny.decoder))(adapter, tiny.base, tiny.batch(1, 8, 16))
    rest = jax.random.key(0), np.arange(8)
    answered = answers(tiny.decoder)(tiny.base, adapter, *prompts(), *rest)
    return jax.device_get(((state.adapter, state.moments, sums, losses), answered))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(s, marks=() if s in QUICK else pytest.mark.slow, id="data{}-fsdp{}-tensor{}".format(*s))
        for s in SHAPES
    ],
)
def test_many_devices_are_one(make_tiny, alone, sizes):
    tiny = make_tiny()
    mesh = make_mesh(sizes, jax.devices()[: np.prod(sizes)])
    decoder = tiny.decoder.clone(activation_sharding=sharding.activation_sharding(mesh))
    base = jax.device_put(tiny.base, sharding.tree_shardings(mesh, tiny.base))
    placement = sharding.state_shardings(mesh, tiny.state)
    state = jax.device_put(tiny.state, placement)
    batch = jax.device_put(tiny.batch(0, 16, 16, 2), sharding.batch_sharding(mesh, True))
    step = jax.jit(make_train_step(decoder), out_shardings=(placement, None))
    for _ in range(2):
        state, sums = step(state, base, batch)
    rows = sharding.batch_sharding(mesh, False)
    adapter = lora.scale(state.adapter, 2.0)
    losses = jax.jit(make_eval_step(decoder))(adapter, base, jax.device_put(tiny.batch(1, 8, 16), rows))
    tokens, padding, *rest = prompts()
    cache = sharding.cache_sharding(mesh, decoder.spec.num_kv_heads)
    asked = placed((tokens, padding), rows)
    answered = answers(decoder, cache)(
        base, adapter, *asked, *rest, jax.random.key(0), placed(np.arange(8), rows)
    )

    kernel = base["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])
    expected, expected_answers = alone
    # By the norm of each leaf: where a gradient is all but zero, Adam turns its rounding into a step of full size.
    found = (state.adapter, state.moments, sums, losses)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    for ours, theirs in zip(answered, expected_answers, strict=True):
        np.testing.assert_array_equal(ours, theirs)

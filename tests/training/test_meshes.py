"""A train step and an evaluation on eight simulated devices give the single device's numbers, whatever the mesh."""

import jax
import numpy as np
import pytest

from jaxlora.lora import tree as lora
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.step import make_eval_step, make_train_step


@pytest.fixture(scope="module")
def alone(make_tiny):
    """Two steps and an evaluation on one device."""
    tiny = make_tiny()
    step = jax.jit(make_train_step(tiny.decoder))
    state, batch = tiny.state, tiny.batch(0, 16, 16, 2)
    for _ in range(2):
        state, sums = step(state, tiny.base, batch)
    losses = jax.jit(make_eval_step(tiny.decoder))(
        lora.scale(state.adapter, 2.0), tiny.base, tiny.batch(1, 8, 16)
    )
    return jax.device_get((state.adapter, state.moments, sums, losses))


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=["data8", "fsdp8", "data2-fsdp2-tensor2"]
)
def test_eight_devices_are_one(make_tiny, alone, sizes):
    tiny = make_tiny()
    mesh = make_mesh(sizes, jax.devices())
    decoder = tiny.decoder.clone(activation_sharding=sharding.activation_sharding(mesh))
    base = jax.device_put(tiny.base, sharding.tree_shardings(mesh, tiny.base))
    placement = sharding.state_shardings(mesh, tiny.state)
    state = jax.device_put(tiny.state, placement)
    batch = jax.device_put(tiny.batch(0, 16, 16, 2), sharding.batch_sharding(mesh, True))
    step = jax.jit(make_train_step(decoder), out_shardings=(placement, None))
    for _ in range(2):
        state, sums = step(state, base, batch)
    held_out = jax.device_put(tiny.batch(1, 8, 16), sharding.batch_sharding(mesh, False))
    losses = jax.jit(make_eval_step(decoder))(lora.scale(state.adapter, 2.0), base, held_out)

    kernel = base["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])
    # By the norm of each leaf: where a gradient is all but zero, Adam turns its rounding into a step of full size.
    found = (state.adapter, state.moments, sums, losses)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)

"""What a layer keeps is the same array, and kept as bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.kept import kept

POLICY = jax.checkpoint_policies.save_only_these_names("inner")


def layer(x):
    return jnp.tanh(jnp.sin(kept(x, "inner") * 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_value_and_gradient_are_unchanged(dtype):
    x = jnp.asarray([0.1, -0.0, 2.5, jnp.inf, jnp.nan], dtype)
    np.testing.assert_array_equal(
        np.asarray(kept(x, "inner")).view(np.uint8),
        np.asarray(x).view(np.uint8),  # bit for bit, -0 and NaN too
    )
    some = x[:3]

    def total(f):
        return jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32)))(some)

    plain = total(lambda x: jnp.tanh(jnp.sin(x * 3)))
    for f in (layer, jax.checkpoint(layer, policy=POLICY)):
        np.testing.assert_array_equal(np.asarray(total(f), np.float32), np.asarray(plain, np.float32))


@pytest.mark.parametrize(("dtype", "kept_as"), [("bfloat16", "uint16"), ("float32", "float32")])
def test_over_scanned_layers_it_alone_is_kept(dtype, kept_as):
    def total(x):
        last, _ = jax.lax.scan(
            lambda x, _: (jax.checkpoint(layer, policy=POLICY)(x), None), x, None, length=5
        )
        return jnp.sum(last.astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(total))(jnp.ones(7, dtype)))
    assert f"{'u16' if kept_as == 'uint16' else 'f32'}[5,7]" in text
    assert "bf16[5,7]" not in text

"""The adapter's tree: PEFT's initialisation, scale, merge, and nothing of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.compilation import compiler_options
from jaxlora.core.tree import leaves
from jaxlora.lora import tree as lora


@pytest.fixture
def base():
    key = jax.random.key(0)
    return {
        "embed_tokens": {"embedding": jnp.ones((7, 64))},
        "layers": {
            "self_attn": {
                "q_proj": {"kernel": jax.random.normal(key, (3, 64, 32)), "bias": jnp.zeros((3, 32))}
            },
            "mlp": {"down_proj": {"kernel": jax.random.normal(key, (3, 96, 64))}},
        },
    }


def test_a_new_adapter_is_pefts(base):
    """A is Kaiming-uniform with a = sqrt 5, so U(-1/sqrt(in), 1/sqrt(in)); B is zero."""
    adapter = lora.init(jax.random.key(0), base, {"q_proj": 50, "down_proj": 50})
    shapes = {"/".join(path): leaf.shape for path, leaf in leaves(adapter)}
    assert shapes == {
        "layers/self_attn/q_proj/a": (3, 64, 50), "layers/self_attn/q_proj/b": (3, 50, 32),
        "layers/mlp/down_proj/a": (3, 96, 50), "layers/mlp/down_proj/b": (3, 50, 64),
    }  # fmt: skip
    for path, leaf in leaves(adapter):
        assert leaf.dtype == jnp.float32
        if path[-1] == "b":
            assert not leaf.any()
        else:
            bound = leaf.shape[1] ** -0.5
            assert 0.99 * bound < float(jnp.max(jnp.abs(leaf))) <= bound
            assert float(jnp.std(leaf)) == pytest.approx(bound / 3**0.5, rel=0.02)
            assert abs(float(jnp.mean(leaf))) < 0.02 * bound


def test_a_targets_values_do_not_depend_on_the_other_targets(base):
    both = lora.init(jax.random.key(0), base, {"q_proj": 4, "down_proj": 4})
    one = lora.init(jax.random.key(0), base, {"down_proj": 4})
    assert list(one["layers"]) == ["mlp"]
    np.testing.assert_array_equal(
        one["layers"]["mlp"]["down_proj"]["a"], both["layers"]["mlp"]["down_proj"]["a"]
    )


@pytest.mark.usefixtures("usual_fusions")
def test_a_program_that_runs_once_draws_the_same_numbers(base):
    """To the last bit, though LLVM looks at it for less long; at its shortest look they differ."""

    def drawn(options):
        given = jax.random.key(3)
        made = jax.jit(lambda key: lora.init(key, base, {"q_proj": 16, "down_proj": 16})).lower(given)
        return made.compile(compiler_options=options)(given)

    usual = drawn({"xla_backend_optimization_level": "3", **compiler_options("cpu")})
    once = drawn(compiler_options("cpu", once=True))
    jax.tree.map(np.testing.assert_array_equal, usual, once)
    assert compiler_options("gpu", once=True) == {}


def test_scale_and_merge(base):
    adapter = lora.init(jax.random.key(0), base, {"down_proj": 4})
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    merged = lora.merge(base, lora.scale(adapter, 0.5))
    a, b = adapter["layers"]["mlp"]["down_proj"]["a"], adapter["layers"]["mlp"]["down_proj"]["b"]
    kernel = np.asarray(base["layers"]["mlp"]["down_proj"]["kernel"])
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["down_proj"]["kernel"], kernel + 0.5 * np.matmul(a, b), rtol=1e-5, atol=1e-5
    )
    assert (
        merged["layers"]["self_attn"]["q_proj"]["kernel"] is base["layers"]["self_attn"]["q_proj"]["kernel"]
    )
    assert merged["embed_tokens"]["embedding"] is base["embed_tokens"]["embedding"]

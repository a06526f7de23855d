"""Where arrays live: the tables, what does not divide, and the same numbers on every mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlora.core.errors import InputError
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((2, 4, 1), (2, 4, 1)), ((1, 1, -1), (1, 1, 8))],
)
def test_a_mesh_lays_all_devices(sizes, shape):
    mesh = make_mesh(sizes, jax.devices())
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "said"), [((3, -1, 1), "8 devices"), ((2, 2, 1), "8 devices"), ((-1, -1, 1), "only one axis")]
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, said):
    with pytest.raises(InputError, match=said):
        make_mesh(sizes, jax.devices())


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        (("embed_tokens", "embedding"), P("tensor", "fsdp")),
        (("lm_head", "embedding"), P("tensor", "fsdp")),
        (("layers", "self_attn", "q_proj", "kernel"), P(None, "fsdp", "tensor")),
        (("layers", "self_attn", "q_proj", "bias"), P(None, "tensor")),
        (("layers", "self_attn", "q_proj", "a"), P(None, "fsdp", None)),
        (("layers", "self_attn", "q_proj", "b"), P(None, None, "tensor")),
        (("layers", "mlp", "down_proj", "kernel"), P(None, "tensor", "fsdp")),
        (("layers", "mlp", "down_proj", "a"), P(None, "tensor", None)),
        (("layers", "input_layernorm", "scale"), P()),
        (("norm", "scale"), P()),
    ],
)
def test_a_leaf_is_placed_by_its_path(path, spec):
    assert sharding.partition(path) == spec


def test_a_dimension_that_does_not_divide_is_named_with_what_would():
    mesh = make_mesh((1, 1, 8), jax.devices())
    with pytest.raises(
        InputError, match=r"mesh.tensor = 8 .* layers/self_attn/k_proj/kernel \[2, 48, 36\].*1, 2, 3, 4, 6"
    ):
        sharding.parameter_sharding(mesh, ("layers", "self_attn", "k_proj", "kernel"), (2, 48, 36))


def test_moments_lie_where_their_leaf_lies():
    from jaxlora.training.optimizer import OptimizerSettings
    from jaxlora.training.state import Settings, new_state

    adapter = {
        "layers": {
            "mlp": {"up_proj": {"a": np.ones((2, 8, 4), np.float32), "b": np.ones((2, 4, 16), np.float32)}}
        }
    }
    numbers = Settings(OptimizerSettings(*[1.0] * 9), 0.0, 1.0, 0.0)
    state = jax.eval_shape(lambda a: new_state(a, jax.random.key(0), numbers), adapter)
    placed = sharding.state_shardings(make_mesh((1, 2, 4), jax.devices()), state)
    flat = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(placed)}
    assert sum(spec == P(None, "fsdp", None) for spec in flat.values()) == 3  # a, and its two moments
    assert sum(spec == P(None, None, "tensor") for spec in flat.values()) == 3
    assert all(spec == P() for name, spec in flat.items() if "up_proj" not in name)

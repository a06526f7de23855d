"""The program of a stack: what it multiplies and what it holds, as its compiler says; and ranks that are filled up."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.config.build import programs, stacking
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.lora.spec import TARGETS
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel.mesh import make_mesh
from jaxlora.sweeps import stack

ROWS, LENGTH, MICRO = 2, 32, 2
SPEC = DecoderSpec(
    model_type="qwen2", vocab_size=512, hidden_size=64, intermediate_size=192, num_layers=6, num_heads=4,
    num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, tie_word_embeddings=True,
    sliding_window=None, max_position_embeddings=LENGTH,
)  # fmt: skip


def config(**changed) -> Config:
    return Config.from_dict(
        {
            "model": {"path": "nowhere", "dtype": "float32", "remat": "none"},
            "data": {"train": "nowhere", "max_length": LENGTH},
            "lora": {"rank": changed.pop("rank", 4), "targets": ("q_proj", "down_proj")},
            "train": {"batch_size": MICRO * ROWS, "micro_batch_size": ROWS},
            "eval": {"batch_size": ROWS},
            **changed,
        }
    )


def form(*configs: Config, mesh=None) -> stacking.Form:
    mesh = mesh or make_mesh((1, 1, 1), jax.local_devices()[:1])
    decoder = Decoder(SPEC, remat="none", dtype=jnp.float32)
    model = Model(None, SPEC, decoder, mesh)  # type: ignore[arg-type]
    return stacking.form(configs or (config(),), model, [10] * max(1, len(configs)))


def size(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def compiled():
    """slots -> the compiled program of a stack."""
    found = {}

    def program(slots: int, **changed):
        key = (slots, *sorted(changed))
        if key not in found:
            shaped = form(config(**changed), config())
            (found[key],) = programs.compile_all(shaped.model, [stacking.lower_train(shaped, slots)])
        return found[key]

    return program


def test_each_base_matrix_is_multiplied_once_with_the_rows_of_all_trials():
    """One [K*rows, in] x [in, out] product for each base matrix, in the program as it is given to the compiler."""
    slots = 5
    text = stacking.lower_train(form(), slots).as_text()
    shapes = {
        (SPEC.hidden_size, 4 * 16),
        (SPEC.hidden_size, 2 * 16),
        (SPEC.hidden_size, SPEC.intermediate_size),
        (SPEC.intermediate_size, SPEC.hidden_size),
    }
    products = re.findall(r"dot_general.*?: \(tensor<([\dx]+)xf32>, tensor<([\dx]+)xf32>\)", text)
    for wanted in shapes:
        sides = [
            left if right == "x".join(map(str, wanted)) else right
            for left, right in products
            if "x".join(map(str, wanted)) in (left, right)
        ]
        assert sides, wanted
        for other in sides:  # [K, rows, T, in]: nothing of a trial alone
            assert other.startswith(f"{slots}x{ROWS}x{LENGTH}x"), (wanted, other)
    # Never a base matrix of each trial.
    assert not re.search(rf"tensor<{slots}x(6x)?{SPEC.hidden_size}x{SPEC.intermediate_size}xf32>", text)


@pytest.mark.usefixtures("usual_fusions")
def test_arguments_are_one_base_the_states_and_one_batch(compiled):
    base, state = size(programs_model().shapes()), size(form().like)
    batch = MICRO * ROWS * LENGTH * 5 * 4
    for slots in (1, 4):
        memory = compiled(slots).memory_analysis()
        assert memory.argument_size_in_bytes == base + slots * state + batch + slots
        assert memory.alias_size_in_bytes == slots * state  # donated: the new states take the old ones' place


def programs_model() -> Model:
    return form().model


@pytest.mark.usefixtures("usual_fusions")
def test_temporaries_grow_with_the_trials_and_hold_no_base(compiled):
    base = size(programs_model().shapes())
    one, two, four = (compiled(slots).memory_analysis().temp_size_in_bytes for slots in (1, 2, 4))
    assert (four - two) / 2 == pytest.approx(two - one, rel=0.1)  # linear: so much a trial
    assert one - (two - one) < 0.25 * base  # what no trial adds to is no copy of the base


def test_own_batches_are_each_an_argument(compiled):
    assert form(config(), config(seed=1)).own_batches
    assert form(config(), config(guard={"on_spike": "rollback", "on_nonfinite": "rollback"})).own_batches
    assert not form(config(), config(optim={"learning_rate": 1e-3})).own_batches
    own, shared = (compiled(2, **changed).memory_analysis() for changed in ({"seed": 1}, {}))
    assert own.argument_size_in_bytes - shared.argument_size_in_bytes == MICRO * ROWS * LENGTH * 5 * 4


def test_ranks_are_filled_up_and_cut_back():
    small, large = config(rank=2), config(rank=8)
    shaped = form(small, large)
    model = shaped.model
    state = programs.state_shapes(small, model, 10)
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(draw.integers(1, 9, x.shape), x.dtype), state)
    filled = stack.with_ranks(state, dict.fromkeys(TARGETS, 8))
    assert jax.tree.map(lambda x: x.shape, filled) == jax.tree.map(lambda x: x.shape, shaped.like)
    before, after = (sum(float(abs(x).sum()) for x in jax.tree.leaves(each)) for each in (state, filled))
    assert before == after
    back = stack.with_ranks(filled, dict.fromkeys(TARGETS, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, state))


def test_states_keep_their_slots():
    shaped = form(config(), config(rank=8))
    model = shaped.model
    draw = np.random.default_rng(0)
    own = {"a": 4, "b": 8, "c": 8}
    states = {}
    for name, rank in own.items():
        shapes = programs.state_shapes(config(rank=rank), model, 10)
        states[name] = jax.tree.map(
            lambda x: jax.device_put(np.asarray(draw.integers(1, 9, x.shape), x.dtype), x.sharding), shapes
        )
    stacked = stack.Stack(model.mesh, shaped.like, ("a", "b", "c"))
    for name in "cab":
        stacked.put(name, states[name])

    def holds(name: str) -> bool:
        taken = stacked.take(name, dict.fromkeys(TARGETS, own[name]))
        return jax.tree.all(jax.tree.map(np.array_equal, taken, states[name]))

    assert all(map(holds, "abc"))
    stacked.shrink(("a", "c"))
    assert stacked.names == ("a", "c")
    assert all(map(holds, "ac"))

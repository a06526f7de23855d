"""No device ever gathers the base: one layer's kernels at a time, inside the scan, and never the vocabulary's."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel import sharding
from jaxlora.parallel.collectives import Collective, collectives
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.answers import AnswerProgram

SPEC = DecoderSpec(
    model_type="qwen2", vocab_size=512, hidden_size=64, intermediate_size=192, num_layers=8, num_heads=8,
    num_kv_heads=4, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, tie_word_embeddings=False,
    sliding_window=None, max_position_embeddings=128,
)  # fmt: skip
ROWS, LENGTH, STEPS = 8, 16, 2
SMALLEST = 8 * 64 * 32
"""Elements of the smallest stack of kernels, k_proj's: more than any activation or kernel has, fewer than the head."""


def sent(name: str, sizes: tuple[int, int, int]) -> list[Collective]:
    """The collectives of a program on a mesh of eight devices."""
    config = Config.from_dict(
        {
            "model": {"path": "x"},
            "data": {"train": "x", "max_length": LENGTH},
            "lora": {"rank": 4},
            "train": {"batch_size": STEPS * ROWS, "micro_batch_size": ROWS},
            "eval": {"batch_size": ROWS},
        }
    )
    mesh = make_mesh(sizes, jax.devices())
    decoder = Decoder(SPEC, dtype=jnp.float32, activation_sharding=sharding.activation_sharding(mesh))
    model = Model(None, SPEC, decoder, mesh)  # type: ignore[arg-type]
    state = programs.state_shapes(config, model, steps=10)
    lora = programs.lora_shapes(model, state)
    lowered = {
        "training": lambda: programs.lower_train(config, model, state),
        "evaluation": lambda: programs.lower_evaluation(config, model, lora),
        "generation": lambda: AnswerProgram(decoder, mesh, 17, 8).lower(lora, model.shapes(), ROWS),
    }[name]()
    (compiled,) = programs.compile_all(model, [lowered])
    assert compiled is not None
    return collectives(compiled.as_text() or "")


def largest(found: list[Collective]) -> int:
    """Elements of the largest array that a device is handed by any of them."""
    return max(math.prod(shape) for one in found for shape in one.shapes)


@pytest.mark.parametrize("name", ["training", "evaluation", "generation"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 8, 1), id="fsdp8"),
        pytest.param((2, 2, 2), id="data2-fsdp2-tensor2", marks=pytest.mark.slow),
        pytest.param((1, 1, 8), id="tensor8", marks=pytest.mark.slow),
    ],
)
def test_no_more_than_a_layer_is_gathered(name, sizes):
    found = sent(name, sizes)
    assert largest(found) < SMALLEST
    if sizes[1] > 1:
        kernel = math.prod((64, 192 // sizes[2]))
        layer = [one for one in found for shape in one.shapes if math.prod(shape) == kernel and one.loops]
        assert any(one.times >= SPEC.num_layers for one in layer), "where are the layers gathered?"

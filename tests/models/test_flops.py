"""The count of floating-point operations, beside what is traced and what XLA says."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.models import flops
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training import losses
from jaxlora.training.step import make_train_step

SPEC = {
    "model_type": "qwen2", "vocab_size": 640, "hidden_size": 192, "intermediate_size": 448, "num_heads": 6,
    "num_kv_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "qkv_bias": True,
    "tie_word_embeddings": False, "sliding_window": None, "max_position_embeddings": 512,
}  # fmt: skip
ROWS, MICRO, LENGTH, RANK = 4, 2, 64, 12


def lowered(
    layers: int,
    remat: str,
    micro: int = MICRO,
    targets: Any = "all-linear",
    length: int = LENGTH,
    scan_layers: bool = True,
):
    """(config, model, state's shapes, the train step lowered for one device)."""
    spec = DecoderSpec(num_layers=layers, **SPEC)
    config = Config.from_dict(
        {
            "model": {"path": "x", "remat": remat, "scan_layers": scan_layers},
            "data": {"train": "x", "max_length": length},
            "lora": {"rank": RANK, "targets": targets},
            "train": {"batch_size": ROWS, "micro_batch_size": micro},
        }
    )
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    model = Model(None, spec, Decoder(spec, remat=remat, dtype=jnp.dtype("float32")), mesh)  # type: ignore[arg-type]
    state = programs.state_shapes(config, model, steps=10)
    return config, model, state, programs.lower_train(config, model, state)


def products(jaxpr: Any) -> Iterator[float]:
    """Floating-point operations of each dot_general, times the turns of the scans around it."""
    for equation in jaxpr.eqns:
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            yield (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[axis] for axis in contracted)
            )
        for inner in jaxprs_in_params(equation.params):
            yield from (turns * found for found in products(getattr(inner, "jaxpr", inner)))


@pytest.mark.parametrize(
    ("remat", "targets"),
    [
        ("none", "all-linear"),
        ("dots", "all-linear"),
        ("full", "all-linear"),
        ("offload", "all-linear"),
        ("full", ("q_proj", "o_proj")),
    ],
)
def test_the_count_is_that_of_the_traced_step(remat, targets):
    """Exactly: each product that is left once nobody asks for the gradients of frozen kernels."""
    config, model, state, _ = lowered(3, remat, targets=targets)
    batch = programs.batch_shapes(config, model.mesh, ROWS // MICRO, MICRO)
    traced = jax.make_jaxpr(make_train_step(model.decoder))(state, model.shapes(), batch).jaxpr
    traced, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    mean_row = (
        2.0 * 8 * SPEC["vocab_size"] * SPEC["hidden_size"] * ROWS / MICRO
    )  # of the head, for label smoothing
    expected = flops.training(model.spec, programs.lora_spec(config).ranks, ROWS, LENGTH, remat)
    assert sum(products(traced)) - mean_row == expected.total
    plain = flops.training(model.spec, programs.lora_spec(config).ranks, ROWS, LENGTH, "none")
    assert expected.model == plain.total


def test_the_count_is_nearly_what_xla_says_of_layers_written_out():
    """Without a loop XLA counts everything, not the products alone, but no gradient of the first layer's input."""
    length = losses.CHUNK // ROWS  # one chunk of the loss
    config, model, _, step = lowered(3, "none", micro=ROWS, length=length, scan_layers=False)
    ranks = programs.lora_spec(config).ranks
    expected = flops.training(model.spec, ranks, ROWS, length, "none").total
    first = ((*flops.kernels(model.spec)[name], ranks[name]) for name in ("q_proj", "k_proj", "v_proj"))
    expected -= sum(2.0 * i * o + 2.0 * r * i for i, o, r in first) * ROWS * length
    counted = step.compile().cost_analysis()["flops"]
    assert expected < counted < 1.06 * expected

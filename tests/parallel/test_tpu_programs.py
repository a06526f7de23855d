"""What the compiler makes of a train step for TPUs that are not there; skipped without libtpu."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from benchmarks import aot
from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model, attention
from jaxlora.config.schema import Config
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel import sharding
from jaxlora.parallel.collectives import collectives
from jaxlora.parallel.mesh import make_mesh
from jaxlora.runs.progress import Progress

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.slow, pytest.mark.libtpu]

SPEC = DecoderSpec(
    model_type="qwen2", vocab_size=1024, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, tie_word_embeddings=True,
    sliding_window=None, max_position_embeddings=32_768,
)  # fmt: skip


@pytest.fixture(scope="module")
def chips():
    """The eight chips of a v5e:2x4, for the compiler."""
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no machine to ask
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # others may compile at the same time
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


@pytest.fixture(scope="module")
def train_step(chips):
    """train_step(sizes, length, ...) is the compiled train step on a mesh of so many chips."""

    def compile_(sizes, length, remat="full", kind="auto", **changes):
        config = Config.from_dict(
            {
                "model": {"path": "x", "remat": remat, "attention": kind},
                "data": {"train": "x", "max_length": length},
                "train": {"batch_size": 16, "micro_batch_size": 8},
            }
        )
        spec = dataclasses.replace(SPEC, **changes)
        mesh = make_mesh(sizes, chips[: sizes[0] * sizes[1] * sizes[2]])
        decoder = Decoder(
            spec,
            dtype=jnp.bfloat16,
            activation_sharding=sharding.activation_sharding(mesh) if mesh.size > 1 else None,
            attention=attention(config.model, spec, mesh),
        )
        model = Model(None, spec, decoder, mesh)  # type: ignore[arg-type]
        state = programs.state_shapes(config, model, steps=100)
        (compiled,) = programs.compile_all(model, [programs.lower_train(config, model, state)])
        assert compiled is not None
        return compiled

    return compile_


SQUARE = re.compile(r"\[(\d+,)*4096,4096(,\d+)*\]")


@pytest.mark.parametrize(
    ("sizes", "window"), [((2, 4, 1), None), ((2, 2, 2), 1000)], ids=["rows", "rows and heads, window"]
)
def test_a_train_step_of_long_rows_holds_no_square_of_their_length(train_step, sizes, window):
    program = train_step(sizes, 4096, sliding_window=window).as_text()
    assert "tpu_custom_call" in program  # splash attention, on every chip's own rows and heads
    assert not SQUARE.search(program)
    # None is in a part of the text that nothing seems to call: kernels' own text, over several lines, is read past.
    assert all(one.times for one in collectives(program))


def test_the_plain_formula_does(train_step):
    """The test above could fail."""
    program = train_step((2, 4, 1), 4096, kind="plain").as_text()
    assert "tpu_custom_call" not in program
    assert SQUARE.search(program)


def test_offload_keeps_what_layers_are_given_in_the_hosts_memory(train_step):
    full, offload = (
        train_step((1, 1, 1), 1024, remat=remat, num_layers=16).memory_analysis()
        for remat in ("full", "offload")
    )
    inputs = 16 * 8 * 1024 * 256 * 2  # layers, rows, tokens, width, bytes
    assert full.host_temp_size_in_bytes == 0
    assert offload.host_temp_size_in_bytes == pytest.approx(inputs, rel=0.1)
    saved = full.temp_size_in_bytes - offload.temp_size_in_bytes
    assert saved > 0.7 * inputs


@pytest.mark.usefixtures("chips")
def test_a_7b_base_in_four_bits_is_trained_on_one_chip_of_16_gb(tmp_path):
    case = aot.CASES["quantised"][0]
    assert (case.topology, case.quantize) == ("v5e:1x1", "nf4")
    with Progress() as progress:
        found = aot.train_step(case, aot.config_of(case, tmp_path), progress, False)
    assert found["needed"] < 10e9

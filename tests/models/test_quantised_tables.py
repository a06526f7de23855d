"""Embedding and head in 8 or 4 bits: loaded as they would be after loading, computed as the arrays they stand for."""

import functools
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlora.config.build import inputs, programs, works
from jaxlora.config.build.inputs import Model, check_blocks
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.core.quantised import KINDS, TABLE, plain, quantise
from jaxlora.core.tree import map_leaves
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.decoding import Session
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import tensor_table
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.answers import AnswerProgram
from jaxlora.training.losses import cross_entropy, token_metrics
from tests.models.test_quantised_base import (
    CONFIG,
    SPEC,
    adapter,
    assert_quantised,
    close,
    load,
    on_mesh,
    rows,
    write_folder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    config = CONFIG | {"tie_word_embeddings": True}
    return write_folder(tmp_path_factory.mktemp("base") / "m", config=config)


@pytest.fixture(scope="module")
def pair(folder, tied):
    """pair(tables, kernels, is_tied) -> the base as it is quantised, and the arrays that it stands for; float32."""

    @functools.cache
    def made(tables, kernels="none", is_tied=False):
        held = load(tied if is_tied else folder, quantize=kernels, tables=tables)
        return held, map_leaves(lambda _, leaf: plain(leaf), held)

    return made


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", KINDS)
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_loading_is_quantising_after_loading(tmp_path, monkeypatch, tables, stored, wanted):
    monkeypatch.setattr("jaxlora.models.weights._TABLE_PIECE", 3 * 128)  # of 40 words, three at a time
    folder, told = write_folder(tmp_path / "m", stored), []
    found = load(folder, wanted, None, lambda done, total: told.append((done, total)), tables=tables)
    assert_quantised(found, load(folder, wanted), "none", tables)
    size = sum(x.nbytes for x in jax.tree.leaves(found))
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_kernels_and_tables_are_quantised_each_in_its_own_way(folder, tied):
    assert_quantised(load(folder, quantize="nf4", tables="int8"), load(folder), "nf4", "int8")
    found = load(tied, tables="nf4")
    assert "lm_head" not in found
    assert unembedding(found) is found["embed_tokens"]["embedding"]
    assert_quantised(found, load(tied), "none", "nf4")


@pytest.mark.parametrize("tables", KINDS)
@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 2), (2, 2, 2)])
def test_every_device_holds_its_part_in_whole_blocks(folder, tables, sizes):
    model = on_mesh(folder, "none", sizes, tables)
    found = inputs.base(model)
    assert_quantised(found, load(folder), "none", tables)
    shapes = model.shapes()
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    for one, like in zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (like.shape, like.dtype, like.sharding)
    for values in jax.tree.leaves(found["lm_head"]):
        assert values.addressable_shards[0].data.size * sizes[1] * sizes[2] == values.size


def test_blocks_that_do_not_divide_over_the_mesh_are_refused():
    mesh = make_mesh((1, 4, 1), jax.devices()[:4])
    with pytest.raises(
        InputError, match=r"mesh.fsdp = 4 does not divide embed_tokens/embedding \[40, 128\]"
    ) as caught:
        Model(None, SPEC, Decoder(SPEC), mesh, quantize_embeddings="nf4").shapes()  # type: ignore[arg-type]
    assert "(its 128 in blocks of 64); mesh.fsdp may be 1, 2." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_of_too_few_numbers_are_refused():
    odd = DecoderSpec.from_hf(CONFIG | {"hidden_size": 8 * 13})
    with pytest.raises(
        InputError,
        match=r"model.quantize_embeddings = 'nf4' .* blocks of 64 numbers, or 16 .* embed_tokens has 104",
    ) as caught:
        check_blocks(odd, "none", "nf4")
    assert str(caught.value).count("\n") == 1
    check_blocks(odd, "none", "none")
    check_blocks(DecoderSpec.from_hf(CONFIG | {"intermediate_size": 8 * 13}), "none", "nf4")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_host_never_holds_a_table_as_it_was(tmp_path, repository):
    """Nor in float32: peak resident memory grows by what is kept, and by some pieces that are being read."""
    config = CONFIG | {"hidden_size": 1024, "num_hidden_layers": 1, "vocab_size": 120_000}
    config["tie_word_embeddings"] = True
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    some = np.random.default_rng(0).standard_normal(2**20).astype(ml_dtypes.bfloat16)
    shapes = {
        name: x.stored_shape for x in tensor_table(DecoderSpec.from_hf(config)).values() for name in x.names
    }
    save_file({name: np.resize(some, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    script = f"""if True:
        import jax, jax.numpy as jnp, re
        from jaxlora.models.spec import DecoderSpec
        from jaxlora.models.weights import load_params, resolve_model
        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        jnp.zeros(1).block_until_ready()
        files = resolve_model({str(folder)!r})
        spec, before = DecoderSpec.from_hf(files.config), peak()
        params = load_params(files, spec, "float32", quantize="nf4", quantize_embeddings="nf4")
        print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)))
    """
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    grown, size = map(int, printed.stdout.split())
    table = 2 * 120_000 * 1024
    assert size < 0.29 * table
    assert grown < 0.7 * table  # in bfloat16 it would be 1.0, in float32 2.0


# ---- what is computed ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def trained(decoder, base, adapter):
    """A step's gradient of the smoothed loss with respect to the adapter, losses, and an evaluation's metrics."""
    targets = jnp.roll(rows()[0], -1, axis=1)
    weights = jnp.asarray(np.random.default_rng(5).random((2, 12)) > 0.3, jnp.float32)
    spread = sharding.head_spread(decoder.activation_sharding, decoder.spec.vocab_size)

    def loss(adapter):
        hidden = decoder.apply({"params": base, "lora": adapter}, *rows())
        total, losses = cross_entropy(hidden, unembedding(base), targets, weights, 0.1, 8, spread)
        still = jax.lax.stop_gradient(hidden)
        return total, (losses, token_metrics(still, unembedding(base), targets, weights, 8, spread))

    (total, others), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
    return gradient, total, others


def plainly(is_tied=False, remat="none") -> Decoder:
    spec = DecoderSpec.from_hf(CONFIG | {"tie_word_embeddings": is_tied})
    return Decoder(spec, remat=remat, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("tables", "kernels", "is_tied", "remat"),
    [
        ("int8", "none", False, "none"),
        ("nf4", "none", True, "none"),
        ("nf4", "int8", False, "full"),
        ("nf4", "nf4", False, "dots"),
    ],
)
def test_losses_and_gradients_are_those_of_the_arrays(pair, tables, kernels, is_tied, remat):
    held, arrays = pair(tables, kernels, is_tied)
    close(
        trained(plainly(is_tied, remat), held, adapter(held)),
        trained(plainly(is_tied), arrays, adapter(held)),
    )


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
def test_on_a_mesh_they_are_those_on_one_device(folder, pair, sizes):
    model = on_mesh(folder, "nf4", sizes, "nf4")
    there = trained(model.decoder, inputs.base(model), adapter(model.shapes()))
    held, arrays = pair("nf4", "nf4")
    here = trained(plainly(), arrays, adapter(held))
    close(jax.tree.map(np.asarray, there), here, rtol=1e-5)  # which sums in another order


def test_tables_in_fewer_bits_are_another_function(pair, folder):
    """Or the tests above would compare nothing: the look-up and the head each make another loss."""
    whole = load(folder)
    held, _ = pair("nf4")
    some = adapter(whole)
    losses = [
        float(trained(plainly(), whole | {name: held[name] for name in names}, some)[1])
        for names in ((), ("embed_tokens",), ("lm_head",))
    ]
    assert min(abs(losses[1] - losses[0]), abs(losses[2] - losses[0])) > 1e-5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_looked_up_are_those_of_the_array(kind):
    """To the last bit, in bfloat16 too."""
    draw = np.random.default_rng(0).standard_normal((40, 128)).astype(ml_dtypes.bfloat16)
    table = jax.tree.map(jnp.asarray, quantise(draw, kind, TABLE))
    decoder = Decoder(SPEC)
    tokens = rows()[0]
    found = decoder.apply({}, table, tokens, method=Decoder._look_up)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, plain(table)[tokens])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_of_the_head_is_kept_for_the_backward_pass(kind, dtype):
    head = jax.tree.map(jnp.asarray, quantise(np.asarray(load_head(dtype)), kind, TABLE))
    hidden = jnp.asarray(np.random.default_rng(1).standard_normal((2, 12, 128)), dtype)
    targets, weights = rows()[0], jnp.ones((2, 12))

    def loss(head, hidden):
        return cross_entropy(hidden, head, targets, weights, 0.1)[0]

    def gradient(head):
        return jax.jit(jax.value_and_grad(lambda hidden: loss(head, hidden)))(hidden)

    for mine, other in zip(gradient(head), gradient(plain(head)), strict=True):
        np.testing.assert_array_equal(mine, other)
    _, pullback = jax.vjp(functools.partial(loss, head), hidden)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)) <= hidden.nbytes


def load_head(dtype):
    return 0.1 * jax.random.normal(jax.random.key(3), (40, 128), dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1)])
def test_answers_are_those_of_the_arrays(folder, pair, sizes):
    model = on_mesh(folder, "none", sizes, "nf4")
    program = AnswerProgram(model.decoder, model.mesh, 9, 6, stop_ids=())
    tokens = np.asarray(rows()[0][:, :9], np.int32)
    padding, numbers = np.asarray([0, 4], np.int32), np.arange(2, dtype=np.int32)
    found = program.jitted(inputs.base(model), {}, tokens, padding, *program.rest(), numbers)
    one = on_mesh(folder, "none", (1, 1, 1))
    program = AnswerProgram(one.decoder, one.mesh, 9, 6, stop_ids=())
    other = program.jitted(pair("nf4")[1], {}, tokens, padding, *program.rest(), numbers)
    np.testing.assert_array_equal(found.ids, other.ids)
    assert len(np.unique(found.ids)) > 3


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_conversation_is_that_of_the_arrays(pair, is_tied):
    answers = [
        list(Session(plainly(is_tied), base, {}).answer([3, 1, 4, 1, 5], max_new_tokens=8, stop_ids=()))
        for base in pair("nf4", "none", is_tied)
    ]
    assert answers[0] == answers[1]


# ---- what it takes ------------------------------------------------------------------------------------------------

WORDS = 4096
WIDE = DecoderSpec.from_hf(CONFIG | {"vocab_size": WORDS})


def lowered(name, sizes, tables):
    """A program from shapes alone, and its model."""
    config = Config.from_dict(
        {
            "model": {"path": "x", "dtype": "float32", "quantize_embeddings": tables},
            "data": {"train": "x", "max_length": 16},
            "lora": {"rank": 2},
            "train": {"batch_size": 16, "micro_batch_size": 4},
            "eval": {"batch_size": 4},
        }
    )
    mesh = make_mesh(sizes, jax.devices()[: np.prod(sizes)])
    placed = sharding.activation_sharding(mesh) if mesh.size > 1 else None
    decoder = Decoder(WIDE, dtype=jnp.float32, activation_sharding=placed)
    model = Model(None, WIDE, decoder, mesh, quantize_embeddings=tables)  # type: ignore[arg-type]
    state = programs.state_shapes(config, model, steps=10)
    lora = programs.lora_shapes(model, state)
    made = {
        "training": lambda: programs.lower_train(config, model, state),
        "evaluation": lambda: programs.lower_evaluation(config, model, lora),
        "generation": lambda: AnswerProgram(decoder, mesh, 17, 8).lower(lora, model.shapes(), 4),
    }[name]()
    return made, model


ARRAY = re.compile(r"\b(f32|bf16|u8|s8)\[([\d,]+)\]")
SENDS = re.compile(
    r"= (.*?) (?:all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("
)


@pytest.mark.parametrize("name", ["training", "evaluation", "generation"])
@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 2, 2)])
def test_devices_are_sent_bits(name, sizes):
    """A device's share of the head, in its bits; nothing that is as large as an array."""
    made, model = lowered(name, sizes, "nf4")
    (program,) = programs.compile_all(model, [made])
    text = program.as_text() or ""
    sent = [
        (dtype, math.prod(map(int, shape.split(","))))
        for line in SENDS.findall(text)
        for dtype, shape in ARRAY.findall(line)
    ]
    share = WORDS * 128 // (sizes[1] * sizes[2])
    assert sum(size for dtype, size in sent if dtype == "u8") >= share // 4
    assert max(size for dtype, size in sent if dtype in ("f32", "bf16")) < share // 4


@pytest.mark.usefixtures("usual_fusions")
@pytest.mark.parametrize("tables", KINDS)
def test_the_train_step_is_given_bits_and_dequantises_one_table_alone(tables):
    """The head, once for all micro-batches and chunks; of the embedding, the rows that are looked up."""
    made, model = lowered("training", (1, 1, 1), tables)
    (program,) = programs.compile_all(model, [made])
    other, whole = lowered("training", (1, 1, 1), "none")
    (other,) = programs.compile_all(whole, [other])
    found, expected = program.memory_analysis(), other.memory_analysis()
    saved = works.size_on_device(whole.shapes()) - works.size_on_device(model.shapes())
    assert found.argument_size_in_bytes == expected.argument_size_in_bytes - saved
    assert saved > (0.7 if tables == "int8" else 0.85) * 2 * WORDS * 128 * 4
    head = WORDS * 128 * 4
    assert found.temp_size_in_bytes < expected.temp_size_in_bytes + 1.5 * head


def test_a_look_up_dequantises_its_rows_alone():
    decoder = Decoder(WIDE, remat="none", dtype=jnp.float32)

    def floats(tables):
        """Numbers in the largest array of floats that hidden states come from."""
        _, model = lowered("evaluation", (1, 1, 1), tables)
        traced = jax.make_jaxpr(lambda base, *rows: decoder.apply({"params": base}, *rows))
        shapes = ARRAY.findall(str(traced(model.shapes(), *rows())))
        return max(math.prod(map(int, shape.split(","))) for dtype, shape in shapes if dtype == "f32")

    assert floats("none") == WORDS * 128
    assert floats("nf4") < WORDS * 128 // 4

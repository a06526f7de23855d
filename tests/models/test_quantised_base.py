"""A base in 8 or 4 bits: loaded as it would be after loading, computed as the arrays it stands for, and never those."""

import functools
import itertools
import json
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
from jaxlora.core.compilation import compiler_options
from jaxlora.core.errors import InputError
from jaxlora.core.quantised import KINDS, TABLE, Quantised, plain, quantise
from jaxlora.core.tree import count, leaves, map_leaves
from jaxlora.lora import tree as lora
from jaxlora.lora import variants
from jaxlora.lora.spec import TARGETS, LoraSpec
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, param_likes, param_shapes, resolve_model, tensor_table
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.answers import AnswerProgram

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "vocab_size": 40,
}
SPEC = DecoderSpec.from_hf(CONFIG)


def write_folder(folder, dtype=np.float32, config=CONFIG):
    """Random weights under Hugging Face's names; norms are around 1."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    shapes = {
        name: x.stored_shape for x in tensor_table(DecoderSpec.from_hf(config)).values() for name in x.names
    }
    save_file(
        {
            name: (0.1 * draw.standard_normal(shape) + ("norm" in name)).astype(dtype)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def load(folder, dtype="float32", place=None, progress=None, quantize="none", tables="none"):
    files = resolve_model(str(folder))
    return load_params(files, DecoderSpec.from_hf(files.config), dtype, place, progress, quantize, tables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base") / "m")


@pytest.fixture(scope="module")
def pair(folder):
    """pair(kind) -> the base as it is quantised, and the arrays that it stands for; float32."""

    @functools.cache
    def made(kind):
        held = load(folder, quantize=kind)
        return held, map_leaves(lambda _, leaf: plain(leaf), held)

    return made


def on_mesh(folder, kind, sizes, tables="none") -> Model:
    """A base of float32 that is to live on so many devices."""
    mesh = make_mesh(sizes, jax.devices()[: np.prod(sizes)])
    placed = sharding.activation_sharding(mesh) if mesh.size > 1 else None
    files = resolve_model(str(folder))
    spec = DecoderSpec.from_hf(files.config)
    return Model(
        files, spec, Decoder(spec, dtype=jnp.float32, activation_sharding=placed), mesh, kind, tables
    )


def assert_quantised(found, expected, kind, tables="none"):
    """Kernels, layer by layer, and tables are what `quantise` makes of what was loaded; all else is as it was."""
    found, expected = dict(leaves(found)), dict(leaves(expected))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        wanted = {"kernel": kind, "embedding": tables}.get(path[-1], "none")
        if wanted == "none":
            assert not isinstance(leaf, Quantised)
            np.testing.assert_array_equal(leaf, expected[path])
            continue
        assert isinstance(leaf, Quantised), path
        assert leaf.dtype == expected[path].dtype
        stored = np.asarray(expected[path])
        if path[-1] == "embedding":
            one = quantise(stored, wanted, TABLE)
        else:
            layers = [quantise(layer, wanted) for layer in stored]
            one = jax.tree.map(lambda *x: np.stack(x), *layers)
        np.testing.assert_array_equal(leaf.values, one.values)
        np.testing.assert_array_equal(leaf.scales, one.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_loading_is_quantising_after_loading(tmp_path, kind, stored, wanted):
    folder, told = write_folder(tmp_path / "m", stored), []
    found = load(folder, wanted, None, lambda done, total: told.append((done, total)), kind)
    assert_quantised(found, load(folder, wanted), kind)
    size = sum(x.nbytes for x in jax.tree.leaves(found))
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert count(found) == count(load(folder, wanted))  # as many parameters, in fewer bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 2), (2, 2, 2)])
def test_every_device_holds_its_part_in_whole_blocks(folder, kind, sizes):
    model = on_mesh(folder, kind, sizes)
    found = inputs.base(model)
    assert_quantised(found, load(folder), kind)
    shapes = model.shapes()
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    for one, like in zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (like.shape, like.dtype, like.sharding)
    values = found["layers"]["mlp"]["down_proj"]["kernel"].values
    assert values.addressable_shards[0].data.size * sizes[1] * sizes[2] == values.size


def test_blocks_that_do_not_divide_over_the_mesh_are_refused():
    mesh = make_mesh((1, 4, 1), jax.devices()[:4])
    model = Model(None, SPEC, Decoder(SPEC), mesh, "nf4")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"mesh.fsdp = 4 does not divide .*q_proj/kernel \[3, 128, 128\]"
    ) as caught:
        model.shapes()
    assert "(its 128 in blocks of 64); mesh.fsdp may be 1, 2." in str(caught.value)
    assert "\n" not in str(caught.value)
    Model(None, SPEC, Decoder(SPEC), mesh).shapes()  # type: ignore[arg-type]


def test_kernels_with_too_few_inputs_are_refused():
    odd = DecoderSpec.from_hf(CONFIG | {"intermediate_size": 8 * 13})
    with pytest.raises(
        InputError, match=r"model.quantize = 'int8' .* 64 inputs, or 16 .* down_proj has 104"
    ) as caught:
        check_blocks(odd, "int8")
    assert str(caught.value).count("\n") == 1
    check_blocks(odd, "none")
    check_blocks(DecoderSpec.from_hf(CONFIG | {"intermediate_size": 16 * 13}), "nf4")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_host_never_holds_the_base_as_it_was(tmp_path, repository):
    """Peak resident memory grows by what is kept, and by some tensors that are being read."""
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    folder = write_folder(tmp_path / "m", ml_dtypes.bfloat16, config)
    script = f"""if True:
        import jax, jax.numpy as jnp, re
        from jaxlora.models.spec import DecoderSpec
        from jaxlora.models.weights import load_params, resolve_model
        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        jnp.zeros(1).block_until_ready()
        files = resolve_model({str(folder)!r})
        before = peak()
        params = load_params(files, DecoderSpec.from_hf(files.config), quantize="nf4")
        print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)))
    """
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    grown, size = map(int, printed.stdout.split())
    stored = (folder / "model.safetensors").stat().st_size
    assert stored > 350e6
    assert size < 0.27 * stored
    assert grown < 0.5 * stored


# ---- what is computed ---------------------------------------------------------------------------------------------


def rows(seed=0):
    draw = np.random.default_rng(seed)
    tokens = jnp.asarray(draw.integers(0, SPEC.vocab_size, (2, 12)), jnp.int32)
    positions = jnp.tile(jnp.arange(12), (2, 1))
    return tokens, positions, jnp.ones_like(tokens)


def adapter(base):
    """One that already does something, for all kernels."""
    made = lora.init(jax.random.key(0), base, dict.fromkeys(TARGETS, 4))
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), made)


def close(one, other, rtol=2e-6):
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(mine - theirs) <= rtol * np.linalg.norm(theirs)


def plainly(remat="none") -> Decoder:
    return Decoder(SPEC, remat=remat, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def gradients(decoder, base, adapter):
    """Of a sum of squares with respect to the adapter, and hidden states."""

    def loss(adapter):
        hidden = decoder.apply({"params": base, "lora": adapter}, *rows())
        return jnp.sum(hidden**2 * jnp.cos(jnp.arange(128.0))[None, None, :]), hidden

    return jax.grad(loss, has_aux=True)(adapter)


@pytest.mark.parametrize(
    ("kind", "remat"), [("int8", "none"), ("nf4", "none"), ("nf4", "dots"), ("nf4", "full")]
)
def test_hidden_states_and_gradients_are_those_of_the_arrays(pair, kind, remat):
    held, arrays = pair(kind)
    close(gradients(plainly(remat), held, adapter(held)), gradients(plainly(), arrays, adapter(held)))


def test_on_a_mesh_they_are_those_on_one_device(folder, pair):
    model = on_mesh(folder, "nf4", (1, 2, 2))
    there = gradients(model.decoder, inputs.base(model), adapter(model.shapes()))
    here = gradients(plainly(), pair("nf4")[1], adapter(pair("nf4")[0]))
    close(jax.tree.map(np.asarray, there), here, rtol=1e-5)  # which sums in another order


def test_a_base_in_fewer_bits_is_another_function(pair, folder):
    """Or the test above would compare nothing."""
    decoder, base = Decoder(SPEC, dtype=jnp.float32), load(folder)
    apply = jax.jit(lambda base: decoder.apply({"params": base}, *rows()))
    whole, eight, four = (apply(x) for x in (base, pair("int8")[0], pair("nf4")[0]))
    far = [float(np.linalg.norm(x - whole) / np.linalg.norm(whole)) for x in (eight, four)]
    assert 1e-4 < far[0] < 0.05
    assert 5 * far[0] < far[1] < 0.5


def test_adapters_side_by_side_share_it(pair):
    """What a sweep does: vmap over the adapters alone."""
    decoder = Decoder(SPEC, dtype=jnp.float32)
    held, _ = pair("nf4")
    several = [jax.tree.map(lambda x, k=k: x * k, adapter(held)) for k in (0.5, 1.0, 2.0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)

    def hidden(adapter, base):
        return decoder.apply({"params": base, "lora": adapter}, *rows())

    together = jax.jit(jax.vmap(hidden, in_axes=(0, None)))(stacked, held)
    for one, mine in zip(several, together, strict=True):
        close(mine, jax.jit(hidden)(one, held))


@pytest.mark.parametrize("start", ["kaiming", "pissa_niter_2"])
def test_dora_and_pissa_start_from_the_arrays_that_it_stands_for(pair, start):
    spec = LoraSpec(4, 8.0, 0.0, ("q_proj", "down_proj"), use_dora=True)

    @jax.jit
    def started(base):
        made, anchor = variants.start(jax.random.key(0), base, spec, start)
        return made, variants.effective(base, made, spec.scales, anchor)

    close(started(pair("nf4")[0]), started(pair("nf4")[1]), rtol=1e-4)


def test_devices_are_sent_bits(folder):
    """A generation's prefill and its steps: no kernel is sent as an array, by a layer or whole."""
    model = on_mesh(folder, "nf4", (1, 2, 1))
    lowered = AnswerProgram(model.decoder, model.mesh, 9, 4).lower({}, model.shapes(), 4)
    text = lowered.compile(compiler_options=compiler_options("cpu")).as_text()
    sent = set(re.findall(r"= (\w+)\[(?:1,)?(\d+,\d+)\]\S* all-gather", text))
    kernels = {(shape[-2], shape[-1]) for path, shape in param_shapes(SPEC).items() if path[-1] == "kernel"}
    assert {("u8", f"{i // 2},{o}") for i, o in kernels} <= sent
    assert not {f"{i},{o}" for i, o in kernels} & {shape for dtype, shape in sent if dtype != "u8"}


# ---- what it takes ------------------------------------------------------------------------------------------------

WIDE = DecoderSpec(
    model_type="mistral", vocab_size=256, hidden_size=512, intermediate_size=2048, num_layers=12, num_heads=8,
    num_kv_heads=2, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6, qkv_bias=False, tie_word_embeddings=True,
    sliding_window=None, max_position_embeddings=512,
)  # fmt: skip


def compiled(kind, remat, sizes=(1, 1, 1), length=32):
    """The train step from shapes alone, and the bytes of base and state on a device."""
    config = Config.from_dict(
        {
            "model": {"path": "x", "remat": remat, "quantize": kind},
            "data": {"train": "x", "max_length": length},
            "lora": {"rank": 2},
            "train": {"batch_size": 4, "micro_batch_size": 4},
        }
    )
    mesh = make_mesh(sizes, jax.devices()[: np.prod(sizes)])
    decoder = Decoder(WIDE, activation_sharding=sharding.activation_sharding(mesh) if mesh.size > 1 else None)
    model = Model(None, WIDE, decoder, mesh, kind)  # type: ignore[arg-type]
    state = programs.state_shapes(config, model, steps=10)
    (program,) = programs.compile_all(model, [programs.lower_train(config, model, state)])
    assert program is not None
    return program, works.size_on_device(model.shapes()), works.size_on_device(state)


@pytest.mark.usefixtures("usual_fusions")
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_train_step_is_given_bits_and_holds_a_layers_arrays_at_most(remat):
    program, base, state = compiled("nf4", remat)
    found = program.memory_analysis()
    assert found.argument_size_in_bytes == pytest.approx(base + state + 5 * 4 * 4 * 32, rel=1e-3)
    other, whole, _ = compiled("none", remat)
    assert base < 0.29 * whole
    # No array of all layers, no second one of a layer's, and nothing that is the same in all layers.
    assert found.temp_size_in_bytes <= 1.02 * other.memory_analysis().temp_size_in_bytes


def test_a_7b_base_is_as_small_as_the_plan_says():
    """Mistral's, with small embeddings, within 4.5 GB; Qwen2.5's embedding and head alone are 2.2 GB in bfloat16."""
    from benchmarks.aot import MODELS

    gigabytes = {}
    kinds = ("none", *KINDS)
    for (name, config), kind, tables in itertools.product(MODELS.items(), kinds, kinds):
        spec = DecoderSpec.from_hf({"architectures": None, **config})
        tree = param_likes(spec, jnp.bfloat16, kind, tables)
        gigabytes[name, kind, tables] = (
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(list(tree.values()))) / 1e9
        )
    assert gigabytes["Mistral-7B", "nf4", "none"] < 4.5 < gigabytes["Mistral-7B", "int8", "none"] < 7.8
    assert gigabytes["Qwen2.5-7B", "nf4", "none"] < 5.7 < gigabytes["Qwen2.5-7B", "int8", "none"] < 9.0
    assert 14 < gigabytes["Mistral-7B", "none", "none"] < 15 < gigabytes["Qwen2.5-7B", "none", "none"] < 15.5
    assert gigabytes["Qwen2.5-7B", "nf4", "nf4"] < 4.1 < 4.5 < gigabytes["Qwen2.5-7B", "nf4", "int8"] < 4.7

"""Every way to compute attention gives the plain formula's values and gradients, and none but that one its memory."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.models import sparse as sparse_module
from jaxlora.models.attention import KERNEL_FROM, LONG, MASK_UP_TO, SPARSE_FROM, Attention, attention
from jaxlora.models.blockwise import blockwise
from jaxlora.models.decoder import Decoder
from jaxlora.models.places import Places
from jaxlora.models.sparse import sparse
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.sharding import attention_sharding
from tests.models.rows import drawn, equations, packed

BLOCKWISE, SPARSE = Attention("blockwise"), Attention("sparse")
SPLASH = Attention("splash", interpret=True)


def values_and_gradients(compute, arrays, places):
    """What comes out for tokens that are not padding, and the gradients of a loss that those alone have a part in."""
    *inputs, cotangent = arrays
    real = (places.segments > 0)[:, :, None, None]

    def loss(q, k, v):
        out = jnp.where(real, compute(q, k, v), 0.0)
        return jnp.sum(out * cotangent), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return {"out": out, **dict(zip("qkv", gradients, strict=True))}


def assert_same(found, expected, tolerance):
    for name, array in expected.items():
        assert np.abs(array).max() > 0.1, name  # zeros would agree with anything that is masked
        np.testing.assert_allclose(found[name], array, atol=tolerance, rtol=tolerance, err_msg=name)


def plain_and(places, arrays, window, *others):
    """The plain formula's values and gradients, and those of other ways."""
    return [
        values_and_gradients(
            partial(attention, queries=places, keys=None, window=window, how=how), arrays, places
        )
        for how in (Attention("plain"), *others)
    ]


def multiplications(product: Any) -> int:
    """Of two numbers, in a `dot_general`."""
    ((contracted, _), _), (x, _) = product.params["dimension_numbers"], product.invars
    return product.outvars[0].aval.size * math.prod(x.aval.shape[axis] for axis in contracted)


@pytest.mark.parametrize(
    ("heads", "window"),
    [
        ((4, 2), None),
        ((3, 1), 137),
        pytest.param((4, 2), 2, marks=pytest.mark.slow),
        pytest.param((4, 2), 137, marks=pytest.mark.slow),
        pytest.param((2, 2), None, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_the_plain_formulas(heads, window):
    """Packed rows with padding, of a length that no block divides, several blocks long."""
    places = packed(2, 600, 300, 3, 200)
    plain, *others = plain_and(places, drawn(2, 600, heads, 6), window, BLOCKWISE, SPARSE, SPLASH)
    for other in others:
        assert_same(other, plain, 1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_the_plain_formula_has_the_gradients_that_jax_derives(heads):
    """Its backward pass is written by hand; here it is a product, a softmax, a product, and none of its code."""
    places = packed(2, 19, 5, 7)
    q, k, v, cotangent = drawn(2, 19, heads, 8)
    after = places.positions[:, :, None] >= places.positions[:, None, :]
    same = places.segments[:, :, None] == places.segments[:, None, :]
    real = places.segments[:, :, None, None] > 0

    def formula(q, k, v):
        k, v = (jnp.repeat(x, heads[0] // heads[1], axis=2) for x in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where((after & same)[:, None, :, :], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def ours(q, k, v):
        return attention(q, k, v, places, None, None, Attention("plain"))

    def gradients(f):
        return jax.grad(lambda *x: jnp.sum(jnp.where(real, f(*x), 0.0) * cotangent), argnums=(0, 1, 2))(
            q, k, v
        )

    np.testing.assert_allclose(
        np.where(real, ours(q, k, v), 0), np.where(real, formula(q, k, v), 0), rtol=2e-6, atol=2e-6
    )
    for mine, derived in zip(gradients(ours), gradients(formula), strict=True):
        np.testing.assert_allclose(mine, derived, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("block", "window"), [(16, None), (33, 9), (16, 40)])
def test_blocks_of_any_size(block, window):
    places = packed(3, 100, 41, 20, 17)
    arrays = drawn(3, 100, (4, 2), 6)
    (plain,) = plain_and(places, arrays, window)
    for compute in (
        partial(blockwise, queries=places, keys=None),
        partial(sparse, segments=places.segments),
    ):
        found = values_and_gradients(partial(compute, window=window, block=block), arrays, places)
        assert_same(found, plain, 1e-5)


@pytest.mark.parametrize(
    ("time", "window"), [(SPARSE_FROM, None), (200, 137), pytest.param(256, None, marks=pytest.mark.slow)]
)
def test_rows_of_two_blocks(time, window):
    """The last block full and not, examples that end within one, rows that end in padding."""
    places = packed(2, time, 50, 60, 10)
    plain, other = plain_and(places, drawn(2, time, (6, 2), 6), window, SPARSE)
    assert_same(other, plain, 1e-5)


def test_rows_of_two_blocks_make_no_scores_of_the_future():
    """Queries of the first block and keys of the second: a quarter of the products over scores."""
    q, k, v, _ = drawn(2, 256, (6, 2), 8)

    def flops(kind):
        run = partial(attention, queries=packed(2, 256, 100, 90), keys=None, window=None, how=Attention(kind))
        grads = jax.grad(lambda *x: jnp.sum(run(*x)), argnums=(0, 1, 2))
        return sum(map(multiplications, equations(jax.make_jaxpr(grads)(q, k, v).jaxpr, "dot_general")))

    assert flops("sparse") == 0.75 * flops("plain")


@pytest.mark.usefixtures("usual_fusions")
def test_rows_of_two_blocks_are_computed_together_up_to_a_memory():
    """64 rows have 34 MB of scores for each of two blocks, which are then never there at once."""

    def temporaries(rows):
        arrays = [jax.ShapeDtypeStruct((rows, 256, heads, 8), jnp.float32) for heads in (4, 2, 2)]
        segments = jax.ShapeDtypeStruct((rows, 256), jnp.int32)
        run = jax.jit(partial(sparse, window=None)).lower(*arrays, segments).compile()
        return run.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]

    few, many = 8, 64
    scores = 4 * 4 * 128 * 256
    assert temporaries(few) > few * scores
    assert temporaries(many) < many * scores / 2


def test_keys_of_a_cache_in_blocks():
    """Queries that are the last of the keys, in rows that begin with padding."""
    time, keys, window = 20, 90, 30
    padding = np.array([[0], [37]])
    key_places, places = (
        Places(jnp.asarray(np.maximum(p, 0), jnp.int32), jnp.asarray(p >= 0, jnp.int32))
        for p in (np.arange(keys) - padding, np.arange(keys - time, keys) - padding)
    )
    arrays = drawn(2, time, (4, 2), 6, keys=keys)
    run = partial(attention, how=Attention("plain"))
    plain, other = (
        values_and_gradients(partial(compute, queries=places, keys=key_places, window=window), arrays, places)
        for compute in (run, partial(blockwise, block=16))
    )
    assert_same(other, plain, 1e-5)


def test_scores_that_no_example_needs_are_not_made(monkeypatch):
    """Of 8 blocks of 16 queries, each meets the blocks from that of its first example's beginning on, and no others."""
    made: list[int] = []
    whole = sparse_module._scores

    def counted(q, near):
        jax.debug.callback(lambda: made.append(near.keys.shape[1] // 16))
        return whole(q, near)

    monkeypatch.setattr(sparse_module, "_scores", counted)
    # Blocks: 0 | 1 to 3, the last of which the third example begins in | 3 and 4 | padding.
    places = packed(1, 128, 16, 40, 20)
    q, k, v, _ = drawn(1, 128, (2, 1), 8)
    jax.jit(partial(sparse, window=None, block=16))(q, k, v, places.segments).block_until_ready()
    jax.effects_barrier()
    assert sorted(made) == sorted([1, 1, 2, 3, 2, 1, 1, 1])


@pytest.mark.slow
def test_bfloat16_is_as_close_as_the_plain_formula():
    """All are bfloat16 products with float32 sums: none is much further from float32 than another."""
    places = packed(2, 140, 80, 50)
    wide = drawn(2, 140, (4, 2), 64)
    narrow = [array.astype(jnp.bfloat16) for array in wide]
    (exact,) = plain_and(places, wide, None)
    plain, *others = (
        {
            name: float(jnp.sqrt(jnp.mean((found[name].astype(jnp.float32) - exact[name]) ** 2)))
            for name in exact
        }
        for found in plain_and(places, narrow, None, BLOCKWISE, SPARSE, SPLASH)
    )
    for errors in others:
        for name, error in plain.items():
            assert 0 < errors[name] < 1.5 * error, (name, errors, plain)


# ---- over devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes", "heads"),
    [
        ("splash", (2, 2, 2), (4, 2)),
        ("blockwise", (2, 2, 2), (4, 2)),
        ("sparse", (2, 2, 2), (4, 2)),
        pytest.param("sparse of many blocks", (2, 2, 2), (4, 2), marks=pytest.mark.slow),
        pytest.param("splash", (1, 2, 4), (4, 2), marks=pytest.mark.slow),  # half a key head each
        pytest.param("splash", (1, 4, 2), (3, 1), marks=pytest.mark.slow),  # heads that do not divide
        pytest.param("splash", (8, 1, 1), (2, 1), marks=pytest.mark.slow),
        pytest.param("blockwise", (1, 2, 4), (4, 2), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does(kind, sizes, heads):
    mesh = make_mesh(sizes, jax.devices())
    placement = attention_sharding(mesh)
    kind, *longer = kind.split(" of ")
    time = 300 if longer else 130
    places = packed(8, time, time - 60, 40)
    arrays = drawn(8, time, heads, 6)
    run = partial(attention, queries=places, keys=None, window=50)
    alone = values_and_gradients(partial(run, how=Attention("plain")), arrays, places)
    fits = [x.shape[2] % mesh.shape["tensor"] == 0 for x in arrays]
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    cut = [jax.device_put(x, placement if fit else rows) for x, fit in zip(arrays, fits, strict=True)]
    run = partial(attention, queries=Places(*(jax.device_put(x, rows) for x in places)), keys=None, window=50)
    how = Attention(kind, sharding=placement, interpret=True)
    assert_same(values_and_gradients(partial(run, how=how), cut, places), alone, 1e-5)


# ---- the decoder -----------------------------------------------------------------------------------------------------

SPEC = DecoderSpec(
    model_type="mistral", vocab_size=61, hidden_size=24, intermediate_size=32, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=6, rms_norm_eps=1e-6, rope_theta=100.0, qkv_bias=False, tie_word_embeddings=True,
    sliding_window=20, max_position_embeddings=4096,
)  # fmt: skip


@pytest.mark.parametrize("how", [BLOCKWISE, SPARSE, SPLASH], ids=lambda how: how.kind)
def test_a_packed_row_equals_its_examples_alone(how):
    decoder = Decoder(SPEC, dtype=jnp.float32, attention=how)
    places = packed(1, 130, 70, 50)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 61, (1, 130)), jnp.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens, *places)
    params = jax.tree.map(lambda x: 10 * x, params)  # far enough from zero for neighbours to matter
    apply = jax.jit(decoder.apply)
    row = apply(params, tokens, *places)
    for begin, end in ((0, 70), (70, 120)):
        length = end - begin
        alone = apply(
            params, jnp.roll(tokens, -begin, axis=1), *packed(1, 130, length)
        )  # what stands behind it is padding now
        np.testing.assert_allclose(row[0, begin:end], alone[0, :length], atol=1e-5)
    other = apply(params, tokens.at[0, 69].add(1), *places)
    assert np.abs(row - other)[0, 69].max() > 1e-2
    np.testing.assert_allclose(row[0, 70:120], other[0, 70:120], atol=1e-6)


# ---- which, and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "time", "keys", "own", "kind"),
    [
        (Attention(), SPARSE_FROM - 1, SPARSE_FROM - 1, True, "plain"),
        (Attention(), SPARSE_FROM, SPARSE_FROM, True, "sparse"),
        (Attention(), 256, 32_768, False, "blockwise"),
        (Attention(platform="gpu"), LONG - 1, LONG - 1, True, "plain"),
        (Attention(platform="gpu"), LONG, LONG, True, "blockwise"),
        (Attention(platform="tpu"), KERNEL_FROM - 1, KERNEL_FROM - 1, True, "plain"),
        (Attention(platform="tpu"), KERNEL_FROM, KERNEL_FROM, True, "splash"),
        (Attention(platform="cuda"), MASK_UP_TO, MASK_UP_TO, True, "cudnn"),
        (Attention(platform="cuda", stretches=4), MASK_UP_TO + 1, MASK_UP_TO + 1, True, "cudnn"),
        (Attention(platform="cuda"), MASK_UP_TO + 1, MASK_UP_TO + 1, True, "blockwise"),
        (Attention(platform="tpu"), 1, 32_768, False, "plain"),
        (Attention(platform="tpu"), 256, 32_768, False, "blockwise"),
        (Attention("splash", "tpu"), 256, 1024, False, "plain"),
        (Attention("blockwise"), 1, 1024, False, "plain"),
        (Attention("plain"), 256, 32_768, False, "plain"),
        (Attention("plain", "tpu"), 8192, 8192, True, "plain"),
    ],
)
def test_the_kind_goes_by_platform_and_length(how, time, keys, own, kind):
    assert how.chosen(time, keys, own, 64, "bfloat16") == kind


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float32"), (20, "bfloat16"), (256, "bfloat16")])
def test_cudnn_is_not_chosen_for_what_it_cannot_serve(head_dim, dtype):
    assert Attention(platform="cuda").chosen(1024, 1024, True, head_dim, dtype) == "plain"
    assert Attention("cudnn", "cuda").refusal(head_dim, dtype)
    assert Attention("cudnn", "cuda").refusal(64, "bfloat16") is None


# ---- memory ----------------------------------------------------------------------------------------------------------


def compiled(kind: str, time: int):
    """The gradient of one layer's attention, compiled from shapes."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, k, v = shape((1, time, 4, 64)), shape((1, time, 2, 64)), shape((1, time, 2, 64))
    ids = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def loss(q, k, v, places):
        return jnp.sum(attention(q, k, v, places, None, None, Attention(kind)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, Places(ids, ids)).compile()


@pytest.mark.usefixtures("usual_fusions")
@pytest.mark.parametrize("kind", ["blockwise", "sparse"])
def test_memory_of_blocks_is_linear_in_the_length_of_a_row(kind):
    sizes = {time: compiled(kind, time) for time in (1024, 2048, 4096)}
    memory = [program.memory_analysis().temp_size_in_bytes for program in sizes.values()]
    assert memory[1] < 2.1 * memory[0]
    assert memory[2] < 2.1 * memory[1]
    square = re.compile(r"\[(\d+,)*4096,4096(,\d+)*\]")
    assert not square.search(sizes[4096].as_text())
    plain = compiled("plain", 4096)
    assert square.search(plain.as_text())
    assert plain.memory_analysis().temp_size_in_bytes > 5 * memory[2]

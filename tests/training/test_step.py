"""The step's algebra: micro-batches, packing, masks, dropout, broken numbers; and what it holds in memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.compilation import compiler_options
from jaxlora.lora import tree as lora
from jaxlora.lora.spec import TARGETS
from jaxlora.models.attention import Attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.losses import CHUNK
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.state import Settings, new_state
from jaxlora.training.step import make_eval_step, make_train_step


@pytest.fixture(scope="module")
def compiled(make_tiny):
    """(dropout) -> the tiny decoder's jitted step, the same one at every call."""
    decoder = make_tiny().decoder
    return functools.cache(lambda dropout=False: jax.jit(make_train_step(decoder, dropout)))


def recut(sums, like):
    """A step's sums with its rows as another cut of the same batch has them, and without comparisons, whose
    differences of nearly equal numbers magnify rounding."""
    none = dict.fromkeys(("loss_deviations", "norm_deviations"), np.zeros(()))
    return sums._replace(rows_nll=sums.rows_nll.reshape(like.rows_nll.shape), **none)


def close(one, other, rtol=1e-5):
    """Trees of arrays that agree leaf by leaf, each by its norm.

    Not element by element: where a gradient is all but zero, Adam turns its rounding into a step of full size.
    """
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(mine - theirs) <= rtol * np.linalg.norm(theirs) + 1e-12


def after_two_steps(step, tiny, batch):
    """The second step has a learning rate above zero; its result depends on both gradients."""
    state, _ = step(tiny.state, tiny.base, batch)
    return step(state, tiny.base, batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_micro_batch_of_eight_is_eight_of_one(make_tiny, compiled, smoothing):
    tiny = make_tiny(label_smoothing=smoothing)
    whole, sums = after_two_steps(compiled(), tiny, tiny.batch(0, 8, 16, 1))
    pieces, parts = after_two_steps(compiled(), tiny, tiny.batch(0, 8, 16, 8))
    close(pieces.adapter, whole.adapter)
    close(recut(parts, sums), recut(sums, sums))
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), whole.adapter, tiny.state.adapter)
    assert min(jax.tree.leaves(moved)) > 1e-6


def test_nll_is_never_smoothed_and_loss_is_the_objective(make_tiny, compiled):
    batch = make_tiny().batch(0, 4, 16, 1)
    _, plain = compiled()(make_tiny(label_smoothing=0.0).state, make_tiny().base, batch)
    _, smooth = compiled()(make_tiny(label_smoothing=0.3).state, make_tiny().base, batch)
    np.testing.assert_allclose(smooth.nll, plain.nll, rtol=1e-6)
    np.testing.assert_allclose(plain.objective, plain.nll, rtol=1e-6)
    assert abs(float(smooth.objective - plain.objective)) > 1.0


def test_a_packed_row_trains_as_its_examples_alone(make_tiny, compiled):
    tiny = make_tiny()
    alone = tiny.batch(1, 3, 10)
    alone["weights"][:] = 1.0
    packed = {name: x.reshape(1, 30) for name, x in alone.items()}
    packed["segments"] = np.repeat([[1, 2, 3]], 10, axis=1).reshape(1, 30).astype(np.int32)
    one, sums = compiled()(tiny.state, tiny.base, {name: x[None] for name, x in packed.items()})
    other, parts = compiled()(tiny.state, tiny.base, {name: x[None] for name, x in alone.items()})
    close(one.moments, other.moments)
    rows, (packed_row,) = parts.rows_nll[0], sums.rows_nll[0]
    np.testing.assert_allclose(jnp.mean(rows), packed_row, rtol=1e-5)
    close(sums._replace(rows_nll=0), parts._replace(rows_nll=0))


@pytest.mark.parametrize("broken", ["base", "adapter"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(make_tiny, compiled, broken):
    tiny = make_tiny()
    base = dict(tiny.base)
    state = tiny.state
    if broken == "base":
        base["norm"] = {"scale": base["norm"]["scale"].at[3].set(jnp.nan)}
    else:
        state = state._replace(adapter=jax.tree.map(lambda x: x * 1e30, state.adapter))
    after, sums = compiled()(state, base, tiny.batch(0, 4, 16, 1))
    assert (float(sums.applied), float(sums.finite)) == (0.0, 0.0)
    assert not (math.isfinite(float(sums.objective)) and math.isfinite(float(sums.grad_norm)))
    assert int(after.step) == 1
    for new, old in zip(
        jax.tree.leaves(after._replace(step=0)), jax.tree.leaves(state._replace(step=0)), strict=True
    ):
        np.testing.assert_array_equal(new, old)


def test_a_batch_without_a_trained_token_moves_nothing(make_tiny, compiled):
    """Not even what is decayed or remembered without a gradient; and it is no alarm."""
    tiny = make_tiny()
    batch = tiny.batch(0, 4, 16, 1)
    before, _ = after_two_steps(compiled(), tiny, batch)
    batch["weights"][:] = 0.0
    after, sums = compiled()(before, tiny.base, batch)
    assert (float(sums.weight), float(sums.applied), float(sums.finite), float(sums.spike)) == (0, 0, 1, 0)
    assert int(after.step) == 3
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), before._replace(step=0))


def test_dropout_draws_anew_each_step_and_micro_batch_and_the_same_for_the_same_step(make_tiny, compiled):
    tiny = make_tiny(lora_dropout=0.5)
    batch = tiny.batch(0, 4, 16, 2)
    step = compiled(True)
    first, again = step(tiny.state, tiny.base, batch)[1], step(tiny.state, tiny.base, batch)[1]
    later = step(tiny.state._replace(step=jnp.asarray(5)), tiny.base, batch)[1]
    undropped = compiled()(tiny.state, tiny.base, batch)[1]
    assert float(first.objective) == float(again.objective)
    assert len({float(x.objective) for x in (first, later, undropped)}) == 3
    settings = tiny.state.settings._replace(lora_dropout=dict.fromkeys(TARGETS, jnp.zeros(())))
    none = step(tiny.state._replace(settings=settings), tiny.base, batch)
    np.testing.assert_allclose(none[1].objective, undropped.objective, rtol=1e-6)


def test_merged_is_applied(make_tiny):
    tiny = make_tiny()
    batch = tiny.batch(2, 3, 16)
    evaluate = jax.jit(make_eval_step(tiny.decoder))
    scaled = lora.scale(tiny.state.adapter, 2.0)
    applied, merged = evaluate(scaled, tiny.base, batch), lora.merge(tiny.base, scaled)
    np.testing.assert_allclose(evaluate({}, merged, batch).nll, applied.nll, rtol=1e-4, atol=1e-5)
    assert not np.allclose(evaluate({}, tiny.base, batch).nll, applied.nll, rtol=1e-2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_changes_memory_only(make_tiny, compiled, remat):
    tiny = make_tiny()
    decoder = tiny.decoder.clone(remat=remat)
    batch = tiny.batch(0, 4, 16, 1)
    close(
        jax.jit(make_train_step(decoder))(tiny.state, tiny.base, batch),
        compiled()(tiny.state, tiny.base, batch),
    )


# ---- what the compiled step holds -------------------------------------------------------------------------------

QWEN_05B = DecoderSpec(
    model_type="qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
    num_kv_heads=2, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, tie_word_embeddings=True,
    sliding_window=None, max_position_embeddings=32_768,
)  # fmt: skip


@functools.cache
def compile_full_size(rows: int, time: int, remat: str = "full", train: bool = True):
    """The train or evaluation step of Qwen2.5-0.5B's shape, compiled from shapes alone: (compiled, base bytes)."""
    decoder = Decoder(QWEN_05B, remat=remat)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    base = jax.eval_shape(decoder.init, jax.random.key(0), ids, ids, ids)["params"]
    adapter = lora.adapter_shapes(base, dict.fromkeys(TARGETS, 16))
    numbers = Settings(OptimizerSettings(*[1.0] * len(OptimizerSettings._fields)), 0.1, 2.0, 0.0)
    state = jax.eval_shape(lambda a: new_state(a, jax.random.key(0), numbers), adapter)
    shape = (1, rows, time) if train else (rows, time)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name in ("tokens", "targets", "segments", "positions")
    }
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if train:
        lowered = jax.jit(make_train_step(decoder), donate_argnums=0).lower(state, base, batch)
    else:
        lowered = jax.jit(make_eval_step(decoder)).lower(adapter, base, batch)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
    return lowered.compile(compiler_options=compiler_options("cpu")), size


@pytest.mark.usefixtures("usual_fusions")
def test_the_full_size_step_never_holds_all_logits():
    compiled, _ = compile_full_size(8, 1024)
    logits = 8 * 1024 * QWEN_05B.vocab_size
    shapes = re.findall(r"\b(?:f32|bf16|f16|pred|s32|u32)\[([\d,]+)\]", compiled.as_text())
    assert len(shapes) > 1000
    vocabulary_sized = [
        sizes
        for sizes in ([int(n) for n in shape.split(",")] for shape in set(shapes))
        if QWEN_05B.vocab_size in sizes
    ]
    assert vocabulary_sized
    largest = max(math.prod(sizes) for sizes in vocabulary_sized)
    assert largest == QWEN_05B.vocab_size * QWEN_05B.hidden_size  # the embedding itself
    assert compiled.memory_analysis().temp_size_in_bytes < logits * 4


@pytest.mark.usefixtures("usual_fusions")
def test_the_base_is_an_argument_and_never_copied():
    compiled, base_bytes = compile_full_size(1, 64)
    memory = compiled.memory_analysis()
    state_bytes = memory.alias_size_in_bytes  # the state is donated: it aliases the output
    batch_bytes = 5 * 4 * 64
    assert memory.argument_size_in_bytes == pytest.approx(base_bytes + state_bytes + batch_bytes, rel=1e-3)
    # With so few tokens the activations are small; what could be large is a copy of the base.
    assert memory.temp_size_in_bytes < 0.5 * base_bytes


@pytest.mark.usefixtures("usual_fusions")
def test_evaluation_needs_no_more_memory_than_training():
    train, _ = compile_full_size(8, 1024)
    evaluate, _ = compile_full_size(8, 1024, train=False)
    assert evaluate.memory_analysis().temp_size_in_bytes <= train.memory_analysis().temp_size_in_bytes


def test_the_step_of_a_gpu_is_the_step(make_tiny, compiled):
    """In float32 it differs from a CPU's in the order of sums alone: products side by side, one chunk and not two."""
    tiny = make_tiny()
    decoder = tiny.decoder.clone(attention=Attention("plain", "gpu"))
    batch = tiny.batch(0, 8, 32, 1)  # 256 tokens at once
    ours, sums = after_two_steps(jax.jit(make_train_step(decoder)), tiny, batch)
    expected, reference = after_two_steps(compiled(), tiny, batch)
    close(ours.adapter, expected.adapter)
    close(recut(sums, sums), recut(reference, sums))


def test_a_gpu_joins_an_adapter_to_its_kernel_unless_there_are_several_or_several_devices(make_tiny):
    tiny = make_tiny()
    batch, spec = tiny.batch(0, 8, 32, 1), tiny.decoder.spec
    on_gpu = tiny.decoder.clone(attention=Attention("plain", "gpu"))
    ranks = 2 * tiny.state.adapter["layers"]["mlp"]["gate_proj"]["a"].shape[-1]
    # Gate's and up's kernel above both b: what stands beside it differs in each.
    joined = f"[{spec.hidden_size + ranks},{spec.intermediate_size}]"

    def text(decoder):
        return str(jax.make_jaxpr(make_train_step(decoder))(tiny.state, tiny.base, batch))

    assert joined in text(on_gpu)
    assert joined not in text(tiny.decoder)
    assert joined not in text(on_gpu.clone(stacked=True))
    on_mesh = sharding.activation_sharding(make_mesh((1, 1, 1), jax.devices()[:1]))
    assert joined not in text(on_gpu.clone(activation_sharding=on_mesh))
    assert f"[256,{spec.vocab_size}]" in text(on_gpu)
    # The largest logit and the sum together: a reduction of pairs.
    assert (" reduce[" in text(on_gpu), " reduce[" in text(tiny.decoder)) == (True, False)
    assert f"[{CHUNK},{spec.vocab_size}]" in text(on_gpu.clone(stacked=True))

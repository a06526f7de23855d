"""What cuDNN is told of a row's examples, and what of attention is kept for the backward pass."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.interpreters import partial_eval

from jaxlora.models.attention import Attention, attention
from jaxlora.models.decoder import REMAT_POLICIES
from jaxlora.models.kernels import _stretches, packed_is_there
from tests.models.rows import drawn, equations, packed


@pytest.mark.parametrize("lengths", [(5,), (3, 4), (2, 1, 4), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("more", [0, 3])
def test_stretches_are_the_examples_and_the_padding_behind_them(lengths, more):
    time = 12
    places = packed(2, time, *lengths)
    counts, starts = _stretches(places.segments, len(lengths) + 1 + more)
    for row in range(2):
        each = [lengths[0] + row, *lengths[1:]]
        each.append(time - sum(each))
        ends = np.cumsum(each)
        nothing = [-1] * more
        assert counts[row].tolist() == each + nothing
        assert starts[row].tolist() == [0, *ends[:-1].tolist(), *nothing, -1]


def test_stretches_of_a_row_that_is_full_and_of_one_that_is_empty():
    counts, starts = _stretches(jnp.asarray([[1] * 6, [0] * 6]), 2)
    assert counts.tolist() == [[6, -1]] * 2
    assert starts.tolist() == [[0, -1, -1]] * 2


@pytest.fixture
def a_hopper(monkeypatch):
    """JAX lowers for a GPU that is not there, as for one of compute capability 9 with cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda least: True)


def lowered_for_cuda(how, window=None, remat=None):
    """The text of a layer's gradient, lowered for a GPU."""
    q, k, v, cotangent = drawn(2, 512, (4, 2), 64, jnp.bfloat16)
    places = packed(2, 512, 200, 100)

    def layer(q, k, v):
        out = attention(q, k, v, places, None, window, how)
        return jnp.sum((out * cotangent) ** 2)

    if remat:
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    traced = jax.jit(jax.value_and_grad(layer, argnums=(0, 1, 2))).trace(q, k, v)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("stretches", "window", "call"),
    [(None, None, "fmhaScaleBiasSoftmax"), (3, None, "fmhaSoftmax"), (3, 100, "fmhaScaleBiasSoftmax")],
)
def test_cudnn_is_given_examples_where_it_can_and_else_a_mask(a_hopper, stretches, window, call):
    text = lowered_for_cuda(Attention("cudnn", "cuda", stretches=stretches), window)
    assert re.findall(r"@__cudnn\$(\w+)\(", text) == [call, f"{call}Backward"]
    assert ("PADDING_CAUSAL" in text) == (call == "fmhaSoftmax")
    assert ("tensor<2x1x512x512xbf16>" in text) == (call != "fmhaSoftmax"), "the mask"


def test_a_jax_that_has_moved_packed_rows_is_noticed(monkeypatch):
    monkeypatch.delattr(fused_attention_stablehlo, "dot_product_attention")
    packed_is_there.cache_clear()
    assert not packed_is_there()
    monkeypatch.undo()
    packed_is_there.cache_clear()
    assert packed_is_there()


@pytest.mark.parametrize("stretches", [None, 3])
def test_dots_keeps_what_cudnn_hands_out(a_hopper, stretches):
    how = Attention("cudnn", "cuda", stretches=stretches)

    def forward(remat):
        return len(re.findall(r"@__cudnn\$fmha(?!\w*Backward)", lowered_for_cuda(how, remat=remat)))

    assert (forward("full"), forward("dots")) == (2, 1)


def gradients_with(remat: str, kind: str, time: int, dtype: Any) -> Any:
    """A layer that is its attention and a matrix, differentiated; without what nobody asks for."""
    q, k, v, _ = drawn(1, time, (4, 2), 8, dtype)
    places, weight = packed(1, time, 60, 30), jnp.ones((8, 8), dtype)

    @partial(jax.checkpoint, policy=REMAT_POLICIES[remat], prevent_cse=False)
    def layer(q, k, v, weight):  # the weight's gradient asks for attention's output
        out = attention(q, k, v, places, None, None, Attention(kind)).astype(dtype)
        return jnp.sum((out @ weight).astype(jnp.float32) ** 2)

    traced = jax.make_jaxpr(jax.value_and_grad(layer, argnums=(0, 1, 2, 3)))(q, k, v, weight).jaxpr
    return partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "forward", "backward"), [("blockwise", 2, 1), ("sparse", 3, 3)])
def test_dots_computes_no_softmax_again_for_what_attention_hands_out(kind, forward, backward, dtype):
    """Three blocks in a row, of whose numbers `sparse` has three branches."""
    full, dots = (
        len(list(equations(gradients_with(remat, kind, 300, dtype), "exp"))) for remat in ("full", "dots")
    )
    assert (full, dots) == (2 * forward + backward, forward + backward)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "time", "blocks"), [("plain", 100, 1), ("sparse", 200, 2)])
def test_dots_multiplies_no_values_again_for_what_attention_hands_out(kind, time, blocks, dtype):
    """The weights are made again, with the scores' product; the product with the values is not."""
    full, dots = (
        len(list(equations(gradients_with(remat, kind, time, dtype), "dot_general")))
        for remat in ("full", "dots")
    )
    assert full - dots == blocks

"""The decoder of Qwen2.5, Mistral and Llama: one function, different specs. The only file that knows Flax.

`Decoder(spec).apply({"params": base, "lora": adapter}, tokens, positions, segments)` takes two plain nested dicts and
returns hidden states. A projection whose path has leaves `a` and `b` in the "lora" collection adds `(x a) b` to its
product, and multiplies by `gain` where there is one; scale, rank and targets are nobody's business here. A kernel may
be `Quantised`, and is then dequantised inside the scan, for one product at a time; so may the tables of embeddings, of
which the rows that are looked up are dequantised. With a "cache" collection the same call attends to keys and values of
earlier tokens too, and leaves those of the new ones in "written".

Layers are stacked on a leading axis and scanned, so compile time and program size do not grow with depth (unless asked
to be written out, one after the other), and each is rematerialised by a named policy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxlora.core.adapted import Low, adapted
from jaxlora.core.kept import kept
from jaxlora.core.products import Products, contract, products_of
from jaxlora.core.quantised import Quantised, plain
from jaxlora.core.spread import at
from jaxlora.models.attention import Attention, attention, rotate, rotation
from jaxlora.models.kernels import CUDNN_FORWARD
from jaxlora.models.places import Places
from jaxlora.models.spec import DecoderSpec


def _dots(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Keeps what has a name, and what cuDNN's attention hands out, inside of which no name can be given."""
    named = jax.checkpoint_policies.save_only_these_names("layer_input", "projection", "attention")
    return primitive.name == CUDNN_FORWARD or named(primitive, *arguments, **parameters)


REMAT_POLICIES = {
    "none": None,  # keep every activation
    "dots": _dots,  # keep the projections' outputs, and attention's
    # keep each layer's input alone
    "full": jax.checkpoint_policies.save_only_these_names("layer_input"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # the same, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""From the least that is computed again to the least that is kept on the device."""

CACHE_ORDER = {"k": ((0, 2, 1, 3), (0, 2, 1, 3), 2), "v": ((0, 2, 3, 1), (0, 3, 1, 2), 3)}
"""How the cache holds keys, [B, K, S, h], and values, [B, K, h, S]: the axes of [B, S, K, h] there, the way back, and
where S is. Both are then contracted over their last axis, so that no product transposes the cache (and XLA's CPU
backend, which has no product of bfloat16 batches in another order, always has one)."""

Dropout = Mapping[str, Float[Array, ""] | float]
"""By the name of a projection: the probability that an input element of its adapter is zeroed."""

_kernel_init = nn.initializers.normal(0.02)


class Projection(nn.Module):
    """One matrix and what stands beside it; `project` multiplies with it.

    Attributes:
        features: O.
        use_bias: whether the base has one.
        dtype: of the base.
    """

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, inputs: int) -> "Weights":
        """The arrays of a projection of so many inputs."""
        kernel: Any = self.get_variable("params", "kernel")
        if not isinstance(kernel, Quantised):  # whose arrays are not of the shape that is checked here
            kernel = self.param("kernel", _kernel_init, (inputs, self.features), self.dtype)
        low, gain, bias = None, None, None
        if self.has_variable("lora", "a"):
            low = Low(self.get_variable("lora", "a"), self.get_variable("lora", "b"))
            gain = self.get_variable("lora", "gain")
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return Weights(kernel, low, gain, bias)

    def dropped(self, x: Float[Array, "B T I"], rates: Dropout) -> Float[Array, "B T I"]:
        """x with elements zeroed at this projection's rate, the others scaled up."""
        return _dropout(x, rates[str(self.name)], self.make_rng("dropout"))


def _dropout(x: Float[Array, "..."], rate: Float[Array, ""] | float, key: Array) -> Float[Array, "..."]:
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


class Weights(NamedTuple):
    """Of a projection: kernel [I, O], its adapter, and the [O] that are multiplied and added last; None for none."""

    kernel: Any
    low: Low | None
    gain: Any
    bias: Any


def project(
    x: Float[Array, "B T I"], lora_dropout: Dropout | None, how: Products, *projections: Projection
) -> list[Float[Array, "B T _"]]:
    """y = (x W (+ (dropout(x) a) b)) (* gain) (+ bias) of each, returned in the base's dtype.

    Each product is summed in float32, and added to others in the dtype of `how.result`.
    """
    weights = [projection(x.shape[-1]) for projection in projections]
    if lora_dropout is None:
        products = adapted(x, [each.kernel for each in weights], [each.low for each in weights], how)
    else:
        products = [contract("BTI,IO->BTO", x, each.kernel, how.result) for each in weights]
    found = []
    for projection, y, (_, low, gain, bias) in zip(projections, products, weights, strict=True):
        if lora_dropout is not None and low is not None:  # then each has an input of its own
            low_rank = contract("BTI,IR->BTR", projection.dropped(x, lora_dropout), low.a, how.result)
            y = y + contract("BTR,RO->BTO", low_rank.astype(x.dtype), low.b, how.result)
        if gain is not None:
            y = y * gain[None, None, :]
        if bias is not None:
            y = y + bias.astype(jnp.float32)[None, None, :]
        found.append(kept(y.astype(x.dtype), "projection"))
    return found


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32, returned in x's dtype (Zhang and Sennrich 2019)."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale.astype(jnp.float32)[None, None, :]).astype(x.dtype)


class SelfAttention(nn.Module):
    spec: DecoderSpec
    dtype: Any
    how: Attention
    products: Products

    @nn.compact
    def __call__(self, x, turned, queries, keys, write_at, lora_dropout):
        spec, dtype = self.spec, self.dtype

        def heads(name: str, count: int):
            return Projection(count * spec.head_dim, spec.qkv_bias, dtype, name=name)

        projected = project(
            x,
            lora_dropout,
            self.products,
            heads("q_proj", spec.num_heads),
            heads("k_proj", spec.num_kv_heads),
            heads("v_proj", spec.num_kv_heads),
        )
        q, k, v = (y.reshape(*y.shape[:2], -1, spec.head_dim) for y in projected)
        # Kept as they are turned: the backward pass needs them so, and would turn them again.
        q, k = (kept(rotate(x, turned), "projection") for x in (q, k))
        if write_at is not None:
            k, v = self._remember("k", k, write_at), self._remember("v", v, write_at)
        y = attention(q, k, v, queries, keys, spec.sliding_window, self.how).astype(dtype)
        output = Projection(spec.hidden_size, False, dtype, name="o_proj")
        return project(y.reshape(*y.shape[:2], -1), lora_dropout, self.products, output)[0]

    def _remember(self, name: str, new: Float[Array, "B T K h"], write_at) -> Float[Array, "B S K h"]:
        """The cached keys or values with new ones from index `write_at` on; the new ones alone are handed out.

        Handing out the whole cache would copy it, all layers, for every token.
        """
        order, back, time = CACHE_ORDER[name]
        new = new.transpose(order)
        self.put_variable("written", name, new)
        cache = jax.lax.dynamic_update_slice_in_dim(
            self.get_variable("cache", name), new, write_at, axis=time
        )
        return cache.transpose(back)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

    spec: DecoderSpec
    dtype: Any
    products: Products

    @nn.compact
    def __call__(self, x, lora_dropout):
        wide, dtype = self.spec.intermediate_size, self.dtype
        gate, up = project(
            x,
            lora_dropout,
            self.products,
            Projection(wide, False, dtype, name="gate_proj"),
            Projection(wide, False, dtype, name="up_proj"),
        )
        inner = (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(dtype)
        down = Projection(self.spec.hidden_size, False, dtype, name="down_proj")
        return project(inner, lora_dropout, self.products, down)[0]


class Block(nn.Module):
    """One pre-norm transformer layer, in the (carry, output) form that `nn.scan` wants."""

    spec: DecoderSpec
    dtype: Any
    activation_sharding: jax.sharding.Sharding | None
    how: Attention
    products: Products

    @nn.compact
    def __call__(self, x, turned, queries, keys, write_at, lora_dropout):
        if self.activation_sharding is not None:
            x = jax.lax.with_sharding_constraint(x, self.activation_sharding)
        x = kept(x, "layer_input")
        norm = RMSNorm(self.spec.rms_norm_eps, self.dtype, name="input_layernorm")(x)
        x = x + SelfAttention(self.spec, self.dtype, self.how, self.products, name="self_attn")(
            norm, turned, queries, keys, write_at, lora_dropout
        )
        norm = RMSNorm(self.spec.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
        return x + MLP(self.spec, self.dtype, self.products, name="mlp")(norm, lora_dropout), None


class Decoder(nn.Module):
    """Tokens to hidden states.

    Attributes:
        spec: the architecture's numbers.
        remat: one of `REMAT_POLICIES`; what a layer keeps for its backward pass.
        dtype: of base, activations and cache (bfloat16, or float32 for tests and small models).
        activation_sharding: placement of the [B, T, D] residual stream, or None for the compiler's choice.
        attention: how it attends.
        stacked: whether it is applied to several adapters at once, under `jax.vmap`.
        scanned: one program for all layers, in a loop; False writes it out for each, and what they keep for the
            backward pass is then not put into arrays of all layers.
    """

    spec: DecoderSpec
    remat: str = "full"
    dtype: Any = jnp.bfloat16
    activation_sharding: jax.sharding.Sharding | None = None
    attention: Attention = Attention()
    stacked: bool = False
    scanned: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        *,
        lora_dropout: Dropout | None = None,
        write_at: Int[Array, ""] | None = None,
        key_positions: Int[Array, "B S"] | None = None,
        key_segments: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; times `unembedding(params)` they are the logits, which never exist.

        Args:
            tokens: ids.
            positions: of each token within its own example, from 0.
            segments: example number within the row, from 1; 0 for padding.
            lora_dropout: for each adapted projection (needs rngs={"dropout": key}); None for none.
            write_at: with a "cache" collection (`layers/self_attn/k` [L, B, K, S, h] and `v` [L, B, K, h, S]) and a
                mutable "written" one: the cache index that the first of these tokens takes. The queries then attend to
                the whole cache with these tokens in it; "written" has their keys and values, T long instead of S.
            key_positions, key_segments: position and segment of every cache index (0 where nothing is written yet).
        """
        embedding = self._table("embed_tokens")
        if not self.spec.tie_word_embeddings:
            self._table("lm_head")
        queries, keys = Places(positions, segments), None
        if key_positions is not None and key_segments is not None:
            keys = Places(key_positions, key_segments)
        block = (
            Block
            if self.remat == "none"
            # A loop's backward pass is another loop; written out, the compiler would see that both make the same.
            else nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scanned)
        )
        # Joined, a stack's kernels would be copied for each adapter, and those of a mesh put together first.
        join = not self.stacked and self.activation_sharding is None
        products = products_of(self.attention.platform, self.dtype, join)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "cache": 0, "written": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 5,  # pyright: ignore[reportArgumentType]  (Flax's annotation forgets it)
            length=self.spec.num_layers,
            unroll=1 if self.scanned else self.spec.num_layers,
        )(self.spec, self.dtype, self.activation_sharding, self.attention, products, name="layers")
        x = self._look_up(embedding, tokens)
        turned = rotation(positions, self.spec.head_dim, self.spec.rope_theta)
        x, _ = layers(x, turned, queries, keys, write_at, lora_dropout)
        return RMSNorm(self.spec.rms_norm_eps, self.dtype, name="norm")(x)

    def _table(self, name: str) -> Any:
        """The rows [V, D] of one of the two tables, which may be quantised."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        held: Any = self.get_variable("params", name)
        if held is None or not isinstance(held["embedding"], Quantised):  # as for a projection's kernel
            held = self.param(name, lambda key: {"embedding": _kernel_init(key, shape, self.dtype)})
        return held["embedding"]

    def _look_up(self, table: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows; of a quantised table, their bits are taken, and sent to where the rows of a batch are."""
        rows = jax.tree.map(lambda x: jnp.take(x, tokens, axis=0), table)
        if isinstance(table, Quantised):
            rows = jax.tree.map(lambda x: at(x, self.activation_sharding), rows)
        return plain(rows)


def unembedding(params: Mapping[str, Any]) -> Any:
    """The matrix [V, D] whose product with hidden states gives logits: the head, or the embedding when tied.

    An array, or a `Quantised`: whoever multiplies with it dequantises it once, outside of loops.
    """
    return params.get("lm_head", params["embed_tokens"])["embedding"]

"""Cross-entropy over a large vocabulary without its logits.

The head is frozen, so the gradient with respect to the hidden states needs nothing that the loss has not just
computed: each chunk of tokens makes its logits, takes loss, metrics and gradient from them, and drops them. Two
matrix products a chunk, no recomputation, and peak memory that knows nothing of the number of tokens.

A chunk is a stretch of time of all rows, so that rows spread over devices stay where they are. Where the head is cut
over devices too (`Spread`), each of them takes the hidden states of a chunk from the devices that share the head with
it, makes the logits of its own words, and hands back its part of the gradient: the head itself never travels.

A head that is kept in 8 or 4 bits is an array for as long as its products take, once for all chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.core.kept import bits, floats
from jaxlora.core.products import GPUS
from jaxlora.core.quantised import Quantised, whole
from jaxlora.core.spread import Spread, at

CHUNK = 128
"""Tokens whose logits exist at once: 128 x 151,936 float32 are 78 MB. With devices that share the work, so many for
each of them."""

CHUNKS = {"gpu": 1024, "cuda": 1024, "tpu": 512}
"""On accelerators, which would read the head for longer than they multiply with it. A chunk reads it twice, and makes
two operations for each token and byte that it reads: a device of F operations and B bytes a second wants F / B tokens
or more (240 on a TPU v5e, 300 on an H100). 512 x 151,936 are 311 MB."""


class Chunks(NamedTuple):
    """How a device takes the tokens; made by `chunks_for`.

    Attributes:
        size: tokens whose logits exist at once.
        one_pass: whether the largest logit and the sum of the exponentials are found in one pass over a chunk's
            logits (Milakov and Gimelshein 2018). A GPU reads them from its memory for every pass.
    """

    size: int = CHUNK
    one_pass: bool = False


def chunks_for(platform: str, stacked: bool = False, evaluating: bool = False) -> Chunks:
    """What suits a platform.

    Args:
        platform: as `models.attention.Attention` has it.
        stacked: whether a chunk exists for each of several adapters, whose tokens share the head's reading.
        evaluating: whether `token_metrics` are made of it, for which a TPU's compiler has several arrays of its size.
    """
    small = stacked or (evaluating and platform == "tpu")
    return Chunks(CHUNK if small else CHUNKS.get(platform, CHUNK), one_pass=platform in GPUS)


class TokenLosses(NamedTuple):
    """What the head says of each token; padding and untrained tokens have zeros.

    Attributes:
        nll: [B, T] float32, negative log-likelihood in nats times the token's weight, never smoothed.
        correct: [B, T] float32, the weight where the likeliest token is the target, else 0.
    """

    nll: Float[Array, "B T"]
    correct: Float[Array, "B T"]


class TokenMetrics(NamedTuple):
    """What an evaluation keeps of each token, times its weight; padding and untrained tokens have zeros.

    Attributes:
        nll, correct: as in `TokenLosses`.
        top5: [B, T] float32, the weight where fewer than five logits are greater than the target's, else 0.
        entropy: [B, T] float32, of the predicted distribution, in nats: lse(z) - sum_v p_v z_v.
        confidence: [B, T] float32, the largest probability.
    """

    nll: Float[Array, "B T"]
    correct: Float[Array, "B T"]
    top5: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    confidence: Float[Array, "B T"]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"] | Quantised,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    label_smoothing: Float[Array, ""] | float = 0.0,
    chunk: int = CHUNK,
    spread: Spread | None = None,
    one_pass: bool = False,
) -> tuple[Float[Array, ""], TokenLosses]:
    """Sum of the weighted, label-smoothed cross-entropy, and each token's plain losses.

    objective = sum_n w_n [lse(z_n) - (1 - s) z_n[y_n] - s mean_v z_n[v]],   z_n = unembed hidden_n

    The mean over the vocabulary of the logits is `hidden . mean(unembed)`: smoothing costs one vector product.
    Only the objective is differentiable, and only in `hidden`: the gradient is made in the forward pass.

    Args:
        hidden: final hidden states; their dtype is the one multiplied in.
        unembed: the output embedding [V, D] (frozen), which may be quantised.
        targets: next-token ids.
        weights: 1 for a trained token, 0 for any other.
        label_smoothing: s in [0, 1), may be traced.
        chunk: tokens whose logits exist at once, for each device.
        spread: where all of that is; None for one device, or to leave it to the compiler.
        one_pass: as in `Chunks`; not for a spread, whose devices have their own words.
    Returns:
        (objective float32, TokenLosses). Nothing is divided: sums and weights leave here.
    Source: Szegedy et al. 2016, section 7 (label smoothing).
    """
    smoothing = jnp.asarray(label_smoothing, jnp.float32)
    chunks = Chunks(chunk, one_pass and spread is None)
    return _cross_entropy(hidden, unembed, targets, weights.astype(jnp.float32), smoothing, chunks, spread)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _cross_entropy(hidden, unembed, targets, weights, smoothing, chunks, spread):
    objective, losses, _ = _in_chunks(
        hidden, unembed, targets, weights, smoothing, chunks, spread, with_gradient=False
    )
    return objective, losses


def _forward(hidden, unembed, targets, weights, smoothing, chunks, spread):
    objective, losses, gradient = _in_chunks(
        hidden, unembed, targets, weights, smoothing, chunks, spread, with_gradient=True
    )
    return (objective, losses), gradient


def _backward(chunks, spread, gradient, cotangents):
    objective_cotangent, _ = cotangents  # the token losses are for reading, not for training
    return (gradient * objective_cotangent).astype(gradient.dtype), None, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _in_chunks(
    hidden, unembed, targets, weights, smoothing, chunks: Chunks, spread: Spread | None, with_gradient: bool
) -> Any:
    """Scans over time in chunks; returns (objective, TokenLosses, gradient [B, T, D] or None)."""
    head = _head(unembed, hidden, spread)
    # The mean as a matrix product: XLA's CPU backend would otherwise hold the whole head in float32 to sum it. The
    # barrier keeps the compiler from seeing that the rows are ones, and turning the product back into that sum.
    ones = jax.lax.optimization_barrier(jnp.ones((8, head.shape[0]), head.dtype))
    mean_row = jnp.einsum("CV,VD->CD", ones, head, preferred_element_type=jnp.float32)[0] / head.shape[0]

    def one(objective, inputs):
        h, y, w = inputs
        logits = _logits(h, head, spread)
        top, total = _top_and_total(logits) if chunks.one_pass else (jnp.max(logits, axis=-1), None)
        exponentials = jnp.exp(logits - top[..., None])
        total = jnp.sum(exponentials, axis=-1) if total is None else total
        lse = top + jnp.log(total)
        right = _of_targets(logits, y, spread)
        mean = jnp.sum(h.astype(jnp.float32) * _for_each(mean_row, h), axis=-1)
        smoothed = lse - (1.0 - smoothing) * right - smoothing * mean
        objective = objective + jnp.sum(jnp.where(w > 0, w * smoothed, 0.0))
        # The likeliest token is the target where the target's logit is the row's largest.
        losses = TokenLosses(jnp.where(w > 0, w * (lse - right), 0.0), jnp.where(right >= top, w, 0.0))
        if not with_gradient:
            return objective, (losses, None)
        # d/dz = w (softmax - (1 - s) onehot - s / V). The onehot is taken off before the product: where softmax is
        # near one, what is left is small, and is rounded as a small number; the mean is one row for all tokens.
        onehot = y[..., None] == _for_each(jnp.arange(logits.shape[-1]), logits)
        slope = exponentials / total[..., None] - jnp.where(onehot, 1.0 - smoothing, 0.0)
        slope = (w[..., None] * slope).astype(h.dtype)
        gradient = jnp.einsum("...V,VD->...D", slope, head, preferred_element_type=jnp.float32)
        gradient = at(gradient, spread and spread.rows)
        gradient = gradient - w[..., None] * smoothing * _for_each(mean_row, h)
        return objective, (losses, gradient.astype(h.dtype))

    start = jnp.zeros((), jnp.float32)
    objective, (losses, gradient) = _over_chunks(one, start, (hidden, targets, weights), chunks.size, spread)
    return objective, losses, gradient


def token_metrics(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"] | Quantised,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int = CHUNK,
    spread: Spread | None = None,
) -> TokenMetrics:
    """What every metric of tokens is made of, without a gradient, from the same chunks as `cross_entropy`.

    Beyond the loss it costs two more sums over the vocabulary, made in the loss's own pass over a chunk's logits:
    no second array of a chunk's size is written.

    Args:
        hidden, unembed, targets, weights, chunk, spread: as for `cross_entropy`.
    """
    head = _head(unembed, hidden, spread)
    weights = weights.astype(jnp.float32)

    def one(carry, inputs):
        h, y, w = inputs
        logits = _logits(h, head, spread)
        top = jnp.max(logits, axis=-1)
        right = _of_targets(logits, y, spread)
        shifted = logits - top[..., None]
        exponentials = jnp.exp(shifted)
        above = (logits > right[..., None]).astype(jnp.float32)
        group = _group(logits.shape[-1], spread)
        total, moment, above = _sums(exponentials, exponentials * shifted, above, group=group)
        found = TokenMetrics(
            nll=top + jnp.log(total) - right,
            correct=(right >= top).astype(jnp.float32),
            top5=((above < 5) & (right <= top)).astype(jnp.float32),  # logits that are NaN are above nothing
            entropy=jnp.log(total) - moment / total,
            confidence=1.0 / total,
        )
        return carry, jax.tree.map(lambda x: jnp.where(w > 0, w * x, 0.0), found)

    _, found = _over_chunks(one, None, (hidden, targets, weights), chunk, spread)
    return found


def _head(
    unembed: Float[Array, "V D"] | Quantised, hidden: Float[Array, "B T D"], spread: Spread | None
) -> Float[Array, "V D"]:
    """The output embedding in the dtype of the hidden states, where its products are."""
    if isinstance(unembed, Quantised):
        return whole(unembed, spread and spread.head, spread.words if spread else 1).astype(hidden.dtype)
    return at(unembed.astype(hidden.dtype), spread and spread.head)


def _logits(
    h: Float[Array, "*N D"], head: Float[Array, "V D"], spread: Spread | None
) -> Float[Array, "*N V"]:
    logits = jnp.einsum("...D,VD->...V", h, head, preferred_element_type=jnp.float32)
    return at(logits, spread and spread.logits)


def _top_and_total(logits: Float[Array, "*N V"]) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """The largest logit m, and the sum of exp(z - m), in one pass (Milakov and Gimelshein 2018, algorithm 3)."""

    def both(one, other):
        (top, total), (their_top, their_total) = one, other
        most = jnp.maximum(top, their_top)
        return most, total * jnp.exp(top - most) + their_total * jnp.exp(their_top - most)

    # Not minus infinity, whose difference to itself is no number.
    nothing = jnp.finfo(jnp.float32).min, jnp.zeros((), jnp.float32)
    return jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, both, (logits.ndim - 1,))


def _of_targets(
    logits: Float[Array, "*N V"], targets: Int[Array, "*N"], spread: Spread | None
) -> Float[Array, "*N"]:
    """The logit of each token's target."""
    if spread is None:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Picking by index would bring all words of a token to one device; a sum of zeros and one logit is exact.
    chosen = targets[..., None] == _for_each(jnp.arange(logits.shape[-1]), logits)
    return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def _for_each(row: Array, x: Float[Array, "*N _"]) -> Array:
    """A row [n] as [1, .., 1, n], with as many axes as x."""
    return jnp.expand_dims(row, tuple(range(x.ndim - 1)))


GROUP = 32
"""Words whose terms are added up in a row: see `_sums`."""


def _group(vocabulary: int, spread: Spread | None) -> int:
    """`GROUP`, or the most below it of which a device's words make up whole groups."""
    if spread is None or spread.words == 1:
        return GROUP
    own = vocabulary // spread.words
    return next(size for size in range(GROUP, 0, -1) if own % size == 0)


def _sums(*terms: Float[Array, "*N V"], group: int = GROUP) -> list[Float[Array, "*N"]]:
    """Sums over the vocabulary, all in one pass.

    XLA adds the terms of several sums one after the other, and a small term is lost beside a large sum: 150,000
    improbable words beside a certain one left out half of an nll of 0.004. So groups of words are added up first.
    """
    *tokens, words = terms[0].shape
    padding = [(0, 0)] * len(tokens) + [(0, -words % group)]
    grouped = [jnp.pad(x, padding).reshape(*tokens, -1, group) for x in terms]
    zeros = (jnp.zeros((), jnp.float32),) * len(terms)
    groups = jax.lax.reduce(
        tuple(grouped), zeros, lambda a, b: jax.tree.map(jnp.add, a, b), (len(tokens) + 1,)
    )
    return [jnp.sum(group, axis=-1) for group in groups]


def _over_chunks(
    one: Callable[..., Any], start: Any, inputs: tuple[Any, ...], chunk: int, spread: Spread | None
) -> Any:
    """Scans over the tokens, about `chunk` of them at once, or so many for each of the spread's parts.

    Tokens that have a weight come first, and chunks without any are not computed: nothing of a prompt or of padding is
    ever multiplied with the head. A spread's tokens stay in their rows, whose stretches are as long for all.

    Args:
        one: (carry, inputs of a chunk [B, C, ...]) -> (carry, outputs [B, C, ...]); without a spread, [C, ...].
        start: the first carry.
        inputs: arrays [B, T, ...]; the last are the weights.
    Returns:
        (last carry, outputs [B, T, ...]), zero for tokens without a weight.
    """
    shape = inputs[0].shape[:2]
    if spread is None:
        # As one row, and below as one axis, which is how products come out: only where the shapes are the same does
        # XLA's CPU backend write the exponentials over the logits.
        inputs = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), inputs)
    rows, time = inputs[0].shape[:2]
    tokens = chunk * (spread.parts if spread else 1)
    stretch = min(max(1, tokens // rows), time)  # positions of every row that make up a chunk
    padding = -time % stretch
    order = jnp.argsort(inputs[-1] <= 0, axis=1, stable=True)

    def split(x):  # [B, T, ...] -> [chunks, B, C, ...]
        x = _along_time(x, order)
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, stretch, *x.shape[2:]), 1, 0)

    def join(x):  # its inverse
        x = jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :time]
        x = _along_time(x, jnp.argsort(order, axis=1))
        return x.reshape(*shape, *x.shape[2:])

    def placed(carry, chunk):
        if spread is not None:
            return one(carry, jax.tree.map(partial(at, placement=spread.tokens), chunk))
        carry, outputs = one(carry, jax.tree.map(lambda x: x[0], chunk))
        return carry, jax.tree.map(lambda x: x[None], outputs)

    def skipped(carry, chunk):
        shapes = jax.eval_shape(placed, carry, chunk)[1]
        return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def where_trained(carry, chunk):
        return jax.lax.cond(jnp.any(chunk[-1] > 0), placed, skipped, carry, chunk)

    carry, outputs = jax.lax.scan(where_trained, start, jax.tree.map(split, inputs))
    return carry, jax.tree.map(join, outputs)


def _along_time(x: Array, order: Int[Array, "B T"]) -> Array:
    """[B, T, ...] with each row's tokens in this order."""
    taken = jnp.take_along_axis(bits(x), order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
    return floats(taken, x.dtype)

"""Answers from a decoder: the cache of keys and values, batches of prompts, and streams of ids.

Two ways to answer, on one function (`advance`):

- `answer_batch`: many prompts, padded on the left to one length, in one compiled program that ends when every row has
  met a stop id; nothing passes between host and device until then. For evaluation.
- `Session`: one conversation whose ids come out one by one. Its cache is kept between answers, and only the ids that
  are new are computed. For a person at a terminal.

In both, cache index s of row b holds position s - padding[b]. That alone makes the mask: padding has negative
positions, and what is not written yet, or left over from an earlier answer, lies in the future of every query.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Bool, Float, Int

from jaxlora.core.compilation import compiler_options
from jaxlora.core.products import contract
from jaxlora.core.quantised import as_array, whole
from jaxlora.core.spread import Spread, at
from jaxlora.models.decoder import CACHE_ORDER, Decoder, unembedding
from jaxlora.models.sampling import Sampling, choose
from jaxlora.models.spec import DecoderSpec

PREFILL = 256
"""The most prompt tokens, in a row, that are computed at once: scores are [B, H, PREFILL, S], not [B, H, T, S]."""

_CHUNKS = (PREFILL, 64, 16)  # what a stream's prompt is cut into, so that few shapes compile
_SMALLEST_CACHE = 256
_VOCABULARY_PIECE = 4096

Cache = dict[str, Any]
"""layers/self_attn: k [L, B, K, S, h] and v [L, B, K, h, S]."""


class Answered(NamedTuple):
    """A batch of answers.

    Attributes:
        ids: int32 [B, max_new_tokens]; 0 after the answer's end. The stop id is not part of an answer.
        lengths: int32 [B], ids in each answer.
        ended: bool [B], whether a stop id ended it (and not max_new_tokens).
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    ended: Bool[Array, "B"]


# ---- the cache ------------------------------------------------------------------------------------------------


def new_cache(
    spec: DecoderSpec, rows: int, capacity: int, dtype: Any, sharding: jax.sharding.Sharding | None = None
) -> Cache:
    """An empty cache.

    Args:
        spec: the decoder's. rows: B. capacity: S, positions it can hold.
        dtype: the base's.
        sharding: placement of its leaves; None leaves it to the compiler.
    """
    shape = np.array([rows, capacity, spec.num_kv_heads, spec.head_dim])

    def zeros(order: tuple[int, ...]) -> Array:
        array = jnp.zeros((spec.num_layers, *shape[list(order)]), dtype)
        return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)

    return {"layers": {"self_attn": {name: zeros(order) for name, (order, _, _) in CACHE_ORDER.items()}}}


def _write(cache: Cache, new: Cache, at: Int[Array, ""] | int) -> Cache:
    """The cache with new keys and values of all layers from index `at` on; in place, where it is donated or carried."""
    old, new = cache["layers"]["self_attn"], new["layers"]["self_attn"]
    written = {
        name: jax.lax.dynamic_update_slice_in_dim(old[name], new[name], at, axis=1 + time)
        for name, (_, _, time) in CACHE_ORDER.items()
    }
    return {"layers": {"self_attn": written}}


def advance(
    decoder: Decoder,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    cache: Cache,
    tokens: Int[Array, "B T"],
    padding: Int[Array, "B"],
    write_at: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Computes T more tokens of every row and remembers their keys and values.

    Args:
        decoder: the model.
        params: the base. lora: the scaled adapter, {} for none.
        cache: of earlier tokens; holds indices below `write_at`.
        tokens: ids that come next.
        padding: cache indices at the beginning of each row that hold nothing.
        write_at: cache index of the first of `tokens`; write_at + T must not exceed the capacity.
    Returns:
        Hidden states, and the cache with `tokens` in it.
    """
    capacity = cache["layers"]["self_attn"]["k"].shape[3]
    positions = (write_at + jnp.arange(tokens.shape[1]))[None, :] - padding[:, None]
    key_positions = jnp.arange(capacity)[None, :] - padding[:, None]
    hidden, variables = decoder.apply(
        {"params": params, "lora": lora, "cache": cache},
        tokens,
        jnp.maximum(positions, 0),
        (positions >= 0).astype(jnp.int32),
        write_at=jnp.asarray(write_at, jnp.int32),
        key_positions=key_positions,
        key_segments=(key_positions >= 0).astype(jnp.int32),
        mutable=["written"],
    )
    return hidden, _write(cache, variables["written"], write_at)  # type: ignore[index]


def _logits(
    table: Float[Array, "V D"], hidden: Float[Array, "B D"], spread: Spread | None = None
) -> Float[Array, "B V"]:
    """The logits of one position a row, from the output embedding.

    On a mesh the devices that share the embedding each make the logits of their own words, and exchange those.

    XLA's CPU backend widens the whole unembedding to float32 before a product with it, anew for each token; in pieces
    that stay in the cache the same product takes a twentieth of the time (4 instead of 100 ms for 49,152 x 576).
    """
    if spread is not None:
        logits = contract("BTD,VD->BTV", at(hidden, spread.tokens)[:, None], table)
        return at(at(logits, spread.logits)[:, 0], spread.rows)
    whole = len(table) // _VOCABULARY_PIECE * _VOCABULARY_PIECE

    def product(hidden, table):
        return contract("BD,VD->BV", hidden, table)

    def in_pieces(hidden, table):
        def piece(start):
            return product(hidden, jax.lax.dynamic_slice_in_dim(table, start, _VOCABULARY_PIECE))

        pieces = jax.lax.map(piece, jnp.arange(0, whole, _VOCABULARY_PIECE))
        pieces = pieces.swapaxes(0, 1).reshape(len(hidden), whole)
        return jnp.concatenate([pieces, product(hidden, table[whole:])], axis=1)

    return jax.lax.platform_dependent(hidden, table, cpu=in_pieces if whole else product, default=product)


# ---- batches --------------------------------------------------------------------------------------------------


def bucket(length: int) -> int:
    """The padded length of a prompt: one more than a multiple of 32 up to 256, of 64 up to 512, of `PREFILL` beyond.

    The one is the last id, with which the loop over new ids begins.
    """
    before = max(1, length - 1)
    step = 32 if before <= 256 else 64 if before <= 512 else PREFILL
    return -(-before // step) * step + 1


def left_pad(
    prompts: Sequence[np.ndarray], rows: int | None = None, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array, each at the right end of its row.

    Args:
        prompts: ids of each.
        rows: B; the rest is empty rows, to which `answer_batch` gives empty answers. None for one row a prompt.
        length: T; None for the bucket of the longest.
    Returns:
        tokens int32 [B, T] and padding int32 [B].
    """
    length = bucket(max((len(prompt) for prompt in prompts), default=1)) if length is None else length
    rows = len(prompts) if rows is None else rows
    tokens, padding = np.zeros((rows, length), np.int32), np.full(rows, length, np.int32)
    for row, prompt in enumerate(prompts):
        padding[row] = length - len(prompt)
        tokens[row, padding[row] :] = prompt
    return tokens, padding


def answer_batch(
    decoder: Decoder,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    padding: Int[Array, "B"],
    stop_ids: Int[Array, "_"],
    sampling: Sampling,
    key: Array,
    rows: Int[Array, "B"],
    *,
    max_new_tokens: int,
    cache_sharding: jax.sharding.Sharding | None = None,
    spread: Spread | None = None,
) -> Answered:
    """Answers a batch of prompts; to be jitted, with `decoder` and the keyword arguments fixed.

    Args:
        decoder: the model.
        params: the base. lora: the scaled adapter, {} for none.
        tokens, padding: from `left_pad`.
        stop_ids: ids that end an answer; may be empty.
        sampling: how ids are chosen.
        key, rows: random key and the prompts' numbers, see `choose`.
        max_new_tokens: longest answer.
        cache_sharding: placement of the cache. spread: of the output embedding and its products.
    """
    # A quantised one becomes an array once for all new ids: for each of them it would be many times a product's work.
    table = whole(unembedding(params), spread and spread.head, spread.words if spread else 1)
    count, length = tokens.shape
    cache = new_cache(decoder.spec, count, length - 1 + max_new_tokens, decoder.dtype, cache_sharding)

    # The prompts' last ids are left to the loop: choosing an id is then written, and compiled, in one place.
    width = PREFILL if (length - 1) % PREFILL == 0 else length - 1
    chunks = tokens[:, :-1].reshape(count, -1, width).swapaxes(0, 1)

    def prefill(cache, chunk):
        index, ids = chunk
        return advance(decoder, params, lora, cache, ids, padding, index * width)[1], None

    cache, _ = jax.lax.scan(prefill, cache, (jnp.arange(len(chunks)), chunks))

    def open_rows(index, answered: Answered):
        return (answered.lengths == index) & ~answered.ended & (padding < length)

    def going(state):
        index, answered, _, _ = state
        return (index < max_new_tokens) & jnp.any(open_rows(index, answered))

    def step(state):
        index, answered, token, cache = state
        write_at = length - 1 + index
        hidden, cache = advance(decoder, params, lora, cache, token[:, None], padding, write_at)
        token = choose(_logits(table, hidden[:, 0], spread), sampling, key, rows, write_at + 1 - padding)
        open_ = open_rows(index, answered)
        stopped = open_ & jnp.isin(token, stop_ids)
        kept = open_ & ~stopped
        answered = Answered(
            answered.ids.at[:, index].set(jnp.where(kept, token, 0)),
            answered.lengths + kept,
            answered.ended | stopped,
        )
        return index + 1, answered, token, cache

    nothing = Answered(
        jnp.zeros((count, max_new_tokens), jnp.int32), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)
    )
    start = (jnp.zeros((), jnp.int32), nothing, tokens[:, -1], cache)
    return jax.lax.while_loop(going, step, start)[1]


# ---- one conversation, id by id -------------------------------------------------------------------------------


class Session:
    """A conversation whose answers come id by id.

    Programs are compiled for prompts in pieces of 256, 64 and 16 ids, for single ids, and for cache sizes that double
    from 256 on, as they are needed. The ids that a prompt has in common with what the cache holds are not computed
    again, so that the turns of a long conversation cost no more than what is new in them.

    Args:
        decoder: the model.
        params: the base. lora: the scaled adapter, {} for none.
        cache_sharding: placement of the cache on the base's mesh; None where the base is on one device.
    Attributes:
        limit: positions that the model was made for; a prompt and its answer together may have that many ids.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Mapping[str, Any],
        lora: Mapping[str, Any],
        cache_sharding: NamedSharding | None = None,
    ):
        self.limit = decoder.spec.max_position_embeddings
        self._params, self._lora = params, lora
        if cache_sharding is None:
            self._whole = placed = SingleDeviceSharding(next(iter(jax.tree.leaves(params)[0].devices())))
        else:
            self._whole, placed = NamedSharding(cache_sharding.mesh, PartitionSpec()), cache_sharding
        self._new, self._grow, self._fill, self._next = _stream_programs(decoder, self._whole, placed)  # pyright: ignore[reportArgumentType]  frozen, so hashable
        # Once for the conversation, where it is quantised: little else of a conversation takes memory.
        self._head = as_array(unembedding(params))
        self._cache: Cache = self._new(capacity=_SMALLEST_CACHE)
        self._held: list[int] = []  # the ids whose keys and values the cache holds, from index 0 on

    @property
    def capacity(self) -> int:
        """Positions that the cache has room for now."""
        return self._cache["layers"]["self_attn"]["k"].shape[3]

    def reserve(self, positions: int) -> bool:
        """Makes room for so many positions; what the cache holds stays.

        Returns:
            Whether the cache had to grow, so that programs will be compiled anew.
        """
        capacity = self.capacity
        while capacity < positions:
            capacity *= 2
        if capacity == self.capacity:
            return False
        self._cache = self._grow(self._cache, self._new(capacity=capacity))
        return True

    def answer(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampling: Sampling = Sampling(),  # noqa: B008  immutable
        seed: int = 0,
    ) -> Generator[int, None, None]:
        """Yields the ids of an answer as they are chosen, without the stop id. May be left at any id.

        Args:
            prompt: ids of the whole conversation so far.
            max_new_tokens: longest answer.
            stop_ids: ids that end it.
            sampling: how ids are chosen.
            seed: of what is drawn.
        Raises:
            ValueError: prompt and answer together would exceed `limit`, or the prompt is empty.
        """
        ids, key = [int(i) for i in prompt], jax.random.key(seed)
        if not ids or max_new_tokens < 1 or len(ids) + max_new_tokens > self.limit:
            raise ValueError(f"{len(ids)} + {max_new_tokens} ids do not fit a context of {self.limit}")
        shared = _shared(self._held, ids[:-1])
        widths = _widths(len(ids) - 1 - shared)
        self.reserve(max(len(ids) + max_new_tokens, shared + sum(widths)))
        del self._held[shared:]
        for width in widths:
            piece = ids[len(self._held) : -1][:width]
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(piece)] = piece
            self._cache = self._fill(self._params, self._lora, self._cache, tokens, len(self._held))
            self._held += piece
        # The prompt's last id opens the loop: choosing is compiled with single ids alone, and not for every piece.
        token = self._choose(jax.device_put(np.array(ids[-1:], np.int32), self._whole), sampling, key)
        self._held.append(ids[-1])
        for remaining in reversed(range(max_new_tokens)):
            # The next id is under way on the device while this one is fetched, looked at and printed.
            following = self._choose(token, sampling, key) if remaining else token
            value = int(token[0])
            if remaining:
                self._held.append(value)
            if value in stop_ids:
                return
            yield value
            token = following

    def _choose(self, token: Array, sampling: Sampling, key: Array) -> Array:
        """Computes one id [1] after those that are held; returns the id [1] that comes next."""
        following, self._cache = self._next(
            self._params, self._lora, self._cache, token, len(self._held), sampling, key, self._head
        )
        return following


@lru_cache(maxsize=4)
def _stream_programs(decoder: Any, whole: jax.sharding.Sharding, cache_sharding: jax.sharding.Sharding):
    """(new, grow, fill, next) of a `Session`, shared by all sessions of a decoder.

    Every placement is fixed: an array that came back from a program elsewhere than it went in would be another type of
    argument, and everything would be compiled twice.
    """
    platform = next(iter(whole.device_set)).platform
    compiled = partial(jax.jit, compiler_options=compiler_options(platform))

    def fill(params, lora, cache, tokens, write_at):
        """One piece of a prompt, padded on the right: what it writes too much is overwritten before it is seen."""
        return advance(decoder, params, lora, cache, tokens, jnp.zeros(1, jnp.int32), write_at)[1]

    def step(params, lora, cache, token, write_at, sampling, key, head):
        row = jnp.zeros(1, jnp.int32)
        hidden, cache = advance(decoder, params, lora, cache, token[:, None], row, write_at)
        position = jnp.asarray(write_at + 1, jnp.int32)[None]
        return choose(_logits(head, hidden[:, 0]), sampling, key, row, position), cache

    new = partial(new_cache, decoder.spec, 1, dtype=decoder.dtype)
    return (
        compiled(new, static_argnames="capacity", out_shardings=cache_sharding),
        compiled(lambda old, larger: _write(larger, old, 0), out_shardings=cache_sharding),
        compiled(fill, donate_argnames="cache", out_shardings=cache_sharding),
        compiled(step, donate_argnames="cache", out_shardings=(whole, cache_sharding)),
    )


def _shared(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids two sequences have in common from the beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids))
    )


def _widths(count: int) -> list[int]:
    """The pieces into which `count` ids are cut; the last one may be wider than what is left for it."""
    widths = []
    while count > 0:
        widths.append(next((w for w in _CHUNKS if w <= count), _CHUNKS[-1]))
        count -= widths[-1]
    return widths

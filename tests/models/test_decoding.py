"""Answers with a cache are the answers without one; what is drawn has the probabilities it should have."""

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.tree import unflatten
from jaxlora.models import decoding
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.decoding import Session, answer_batch, bucket, left_pad
from jaxlora.models.sampling import Sampling, choose, nucleus
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, param_shapes, resolve_model

GREEDY = Sampling(0.0, 1.0)
QWEN2 = DecoderSpec(
    model_type="qwen2",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-6,
    rope_theta=300.0,
    qkv_bias=True,
    tie_word_embeddings=True,
    sliding_window=None,
    max_position_embeddings=2048,
)
SPECS = {
    "qwen2": QWEN2,
    "mistral, window": dataclasses.replace(
        QWEN2,
        model_type="mistral",
        qkv_bias=False,
        tie_word_embeddings=False,
        sliding_window=5,
        num_kv_heads=1,
    ),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@cache
def make(spec):
    """A random decoder whose choices depend on every parameter, and an adapter that changes them."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3 + (path[-1] == "scale"), jnp.float32)

    params = unflatten({path: leaf(path, shape) for path, shape in param_shapes(spec).items()})
    a = rng.normal(size=(spec.num_layers, spec.hidden_size, 2)).astype(np.float32)
    b = rng.normal(size=(spec.num_layers, 2, spec.num_heads * spec.head_dim)).astype(np.float32)
    return Decoder(spec, dtype=jnp.float32), params, {"layers": {"self_attn": {"q_proj": {"a": a, "b": b}}}}


def prompts_of(spec, *lengths):
    rng = np.random.default_rng(7)
    return [rng.integers(1, spec.vocab_size, length).astype(np.int32) for length in lengths]


@cache
def _likeliest(decoder):
    def likeliest(params, lora, tokens, length):
        at = jnp.arange(tokens.shape[1])[None, :]
        hidden = decoder.apply({"params": params, "lora": lora}, tokens, at, (at < length).astype(jnp.int32))
        return jnp.argmax(unembedding(params) @ hidden[0, length - 1])

    return jax.jit(likeliest)


def greedy_by_full_forward(decoder, params, lora, prompt, count):
    """The plain definition: all ids anew for every id, no cache, no left padding."""
    ids = [int(i) for i in prompt]
    tokens = np.zeros((1, -(-(len(ids) + count) // 128) * 128), np.int32)  # few lengths, few compilations
    for _ in range(count):
        tokens[0, : len(ids)] = ids
        ids.append(int(_likeliest(decoder)(params, lora, tokens, len(ids))))
    return ids[len(prompt) :]


@cache
def _batch_program(decoder, count, piece):
    return jax.jit(partial(answer_batch, decoder, max_new_tokens=count))


def batch_answers(
    model, prompts, count, stop_ids=(), sampling=GREEDY, rows=None, numbers=None, length=None, seed=0
):
    decoder, params, lora = model
    tokens, padding = left_pad(prompts, rows, length)
    numbers = np.arange(len(tokens)) if numbers is None else np.asarray(numbers)
    answered = _batch_program(decoder, count, decoding.PREFILL)(
        params, lora, tokens, padding, np.resize([-1, *stop_ids], 3), sampling, jax.random.key(seed), numbers
    )
    return jax.device_get(answered)


def texts(answered):
    return [row[:length].tolist() for row, length in zip(answered.ids, answered.lengths, strict=True)]


# ---- equality -----------------------------------------------------------------------------------------------


@each_spec
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_a_batch_of_different_lengths_equals_full_forwards(spec, adapted):
    decoder, params, lora = make(spec)
    model = decoder, params, lora if adapted else {}
    prompts = prompts_of(spec, 1, 4, 13, 32)
    answered = batch_answers(model, prompts, 12)
    expected = [greedy_by_full_forward(*model, prompt, 12) for prompt in prompts]
    assert texts(answered) == expected
    assert not answered.ended.any()


def test_the_adapter_changes_the_answers():
    """Otherwise the comparison above would not notice an adapter that is left out."""
    decoder, params, lora = make(QWEN2)
    prompts = prompts_of(QWEN2, 4, 13)
    without, with_it = (texts(batch_answers((decoder, params, x), prompts, 12)) for x in ({}, lora))
    assert without != with_it


@each_spec
def test_a_long_prompt_in_pieces_equals_full_forwards(spec, monkeypatch):
    """More than `PREFILL` ids are computed piece by piece; here a piece is 8 ids, wider than the window."""
    monkeypatch.setattr(decoding, "PREFILL", 8)
    model = make(spec)
    prompts = prompts_of(spec, 3, 20, 30)
    answered = batch_answers(model, prompts, 8, length=33)
    assert texts(answered) == [greedy_by_full_forward(*model, prompt, 8) for prompt in prompts]


@each_spec
def test_a_session_equals_full_forwards_over_several_turns(spec):
    """Turns that go on, turn back, and repeat; the cache grows on the way (it begins with 256 positions)."""
    model = make(spec)
    session = Session(*model)
    conversation = prompts_of(spec, 21)[0].tolist()
    for turn in range(4):
        answer = list(session.answer(conversation, max_new_tokens=9, stop_ids=()))
        assert answer == greedy_by_full_forward(*model, conversation, 9)
        conversation += answer[: 9 - turn] + prompts_of(spec, 5 + 70 * turn)[0].tolist()
    assert session.capacity == 512
    for prompt in (conversation[:30], conversation[:30], conversation[:7] + conversation[9:20]):
        assert list(session.answer(prompt, max_new_tokens=9, stop_ids=())) == greedy_by_full_forward(
            *model, prompt, 9
        )


@pytest.mark.slow
@each_spec
@pytest.mark.parametrize("rows", [1, 3])
def test_bfloat16_is_as_near_to_float32_with_a_cache_as_without(spec, rows):
    decoder, params, lora = make(spec)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half = Decoder(spec, dtype=jnp.bfloat16)
    tokens, padding = left_pad(prompts_of(spec, *range(20, 20 + rows)), length=24)
    positions = np.arange(24)[None, :] - padding[:, None]
    batch = tokens, np.maximum(positions, 0), (positions >= 0).astype(np.int32)
    exact = jax.jit(decoder.apply)({"params": params, "lora": lora}, *batch)
    without = jax.jit(half.apply)({"params": narrow, "lora": lora}, *batch)
    cache = decoding.new_cache(spec, rows, 40, jnp.bfloat16)
    advance = jax.jit(partial(decoding.advance, half))
    pieces = []
    for start, stop in ((0, 16), (16, 23), (23, 24)):
        hidden, cache = advance(narrow, lora, cache, tokens[:, start:stop], padding, start)
        pieces.append(hidden)

    def error(found):
        return np.sqrt(np.mean(np.square(np.asarray(found, np.float32) - exact)[positions >= 0]))

    assert 0 < error(jnp.concatenate(pieces, axis=1)) < 1.25 * error(without)


def test_a_session_computes_only_what_is_new(monkeypatch):
    model = make(QWEN2)
    session = Session(*model)
    prompt = prompts_of(QWEN2, 90)[0].tolist()
    answer = list(session.answer(prompt, max_new_tokens=4, stop_ids=()))
    written = []
    for name in ("_fill", "_next"):
        program = getattr(session, name)

        def counted(params, lora, cache, tokens, at, *rest, program=program):
            written.append((at, tokens.size))
            return program(params, lora, cache, tokens, at, *rest)

        monkeypatch.setattr(session, name, counted)
    list(session.answer([*prompt, *answer, 1, 2, 3], max_new_tokens=2, stop_ids=()))
    # 90 ids and the three of the answer that were fed back are held: a piece takes one old id and two new ones
    assert written == [(93, 16), (96, 1), (97, 1)]


def test_a_session_may_be_left_at_any_id():
    model = make(QWEN2)
    session, (first, second) = Session(*model), prompts_of(QWEN2, 20, 40)
    expected = greedy_by_full_forward(*model, first, 6)
    interrupted = session.answer(first, max_new_tokens=100, stop_ids=())
    assert [next(interrupted) for _ in range(3)] == expected[:3]
    interrupted.close()
    assert list(session.answer(first, max_new_tokens=6, stop_ids=())) == expected
    assert list(session.answer(second, max_new_tokens=6, stop_ids=())) == greedy_by_full_forward(
        *model, second, 6
    )


def test_a_session_compiles_each_shape_once():
    decoder, params, lora = make(QWEN2)
    # placed by name, as a loaded base is: such arrays are told from those that merely lie on the default device
    session = Session(decoder, *jax.device_put((params, lora), jax.devices()[0]))
    for program in (session._fill, session._next):
        program.clear_cache()
    for length in (5, 16, 17, 40, 64, 70, 100):
        list(session.answer([length % 61] * length, max_new_tokens=3, stop_ids=()))
    list(session.answer([7] * 9, max_new_tokens=3, stop_ids=(), sampling=Sampling(0.7, 0.9), seed=3))
    assert session._fill._cache_size() == 2  # pieces of 64 and of 16
    assert session._next._cache_size() == 1


def test_a_session_refuses_what_does_not_fit():
    session = Session(*make(QWEN2))
    with pytest.raises(ValueError, match="2040 \\+ 9 ids do not fit a context of 2048"):
        next(session.answer([1] * 2040, max_new_tokens=9, stop_ids=()))
    assert len(list(session.answer([1] * 2040, max_new_tokens=8, stop_ids=()))) == 8


def test_the_unembedding_in_pieces_is_the_whole(monkeypatch):
    """On a CPU the vocabulary is worked through in pieces; 61 words are three pieces of 16 and a rest."""
    params = {"embed_tokens": {"embedding": jax.random.normal(jax.random.key(0), (61, 24))}}
    hidden = jax.random.normal(jax.random.key(1), (3, 24))
    monkeypatch.setattr(decoding, "_VOCABULARY_PIECE", 16)
    found = jax.jit(decoding._logits)(unembedding(params), hidden)
    np.testing.assert_allclose(found, hidden @ params["embed_tokens"]["embedding"].T, rtol=1e-5, atol=1e-5)


# ---- stop ids -----------------------------------------------------------------------------------------------


def test_each_row_ends_at_its_own_stop_id():
    model = make(QWEN2)
    prompts = prompts_of(QWEN2, 6, 11, 23)
    unstopped = [greedy_by_full_forward(*model, prompt, 10) for prompt in prompts]
    stops = [unstopped[0][2], unstopped[1][6]]

    def cut(ids):
        return next((ids[:i] for i, token in enumerate(ids) if token in stops), ids)

    expected = [cut(ids) for ids in unstopped]
    assert len({len(ids) for ids in expected}) > 1
    answered = batch_answers(model, prompts, 10, stops, rows=5)
    assert texts(answered) == [*expected, [], []]
    assert answered.ended.tolist() == [*(len(ids) < 10 for ids in expected), False, False]
    assert not any(row[length:].any() for row, length in zip(answered.ids, answered.lengths, strict=True))
    session = Session(*model)
    assert [list(session.answer(p, max_new_tokens=10, stop_ids=stops)) for p in prompts] == expected


def test_a_batch_ends_when_all_rows_have(monkeypatch):
    """A program that went on to max_new_tokens would call the decoder as often."""
    steps = []
    choose = decoding.choose

    def counted(logits, *rest):
        jax.debug.callback(lambda: steps.append(1))
        return choose(logits, *rest)

    monkeypatch.setattr(decoding, "choose", counted)
    model = make(QWEN2)
    prompt = prompts_of(QWEN2, 9)[0]
    stop = greedy_by_full_forward(*model, prompt, 3)[2]
    answered = batch_answers(model, [prompt], 500, [stop], rows=2)
    jax.effects_barrier()
    assert len(steps) == int(answered.lengths[0]) + 1 <= 3


# ---- sampling -----------------------------------------------------------------------------------------------

LOGITS = jnp.log(jnp.array([0.40, 0.25, 0.15, 0.10, 0.06, 0.04]))


def draws(sampling, count=20_000, logits=LOGITS):
    many = jnp.broadcast_to(logits, (count, len(logits)))
    positions = jnp.arange(count)
    ids = jax.jit(choose)(many, sampling, jax.random.key(0), jnp.zeros(count, jnp.int32), positions)
    return np.bincount(np.asarray(ids), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(0.0, 1.0), [1, 0, 0, 0, 0, 0]),
        (Sampling(1.0, 1e-6), [1, 0, 0, 0, 0, 0]),
        (Sampling(1.0, 1.0), [0.40, 0.25, 0.15, 0.10, 0.06, 0.04]),
        (Sampling(1.0, 0.75), [0.50, 0.3125, 0.1875, 0, 0, 0]),
        (Sampling(1.0, 0.6), [0.40 / 0.65, 0.25 / 0.65, 0, 0, 0, 0]),
        (Sampling(0.5, 1.0), np.array([0.16, 0.0625, 0.0225, 0.01, 0.0036, 0.0016]) / 0.2602),
    ],
    ids=str,
)
def test_draws_have_the_right_frequencies(sampling, expected):
    found = draws(sampling)
    # five standard deviations of a frequency over 20,000 independent draws; none at all where it must be 0 or 1
    spread = 5 * np.sqrt(np.asarray(expected) * (1 - np.asarray(expected)) / 20_000)
    assert (np.abs(found - expected) <= spread).all()


def test_the_nucleus_is_that_of_a_sort():
    logits = np.random.default_rng(0).normal(size=(40, 301)).astype(np.float32) * 3
    for top_p in (1e-4, 0.3, 0.9, 0.999):
        kept = np.isfinite(np.asarray(jax.jit(nucleus)(logits, top_p)))
        chances = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
        chances /= chances.sum(1, keepdims=True)
        order = np.argsort(-chances, axis=1)
        before = np.cumsum(np.take_along_axis(chances, order, 1), axis=1) - np.take_along_axis(
            chances, order, 1
        )
        expected = np.zeros_like(kept)
        np.put_along_axis(expected, order, before < top_p, 1)
        assert (kept == expected).all()


def test_what_is_drawn_depends_on_prompt_and_position_not_on_the_batch():
    model, hot = make(QWEN2), Sampling(1.0, 0.95)
    prompts = prompts_of(QWEN2, 5, 12, 30)
    together = texts(batch_answers(model, prompts, 10, sampling=hot))
    alone = [
        texts(batch_answers(model, [p], 10, sampling=hot, numbers=[i]))[0] for i, p in enumerate(prompts)
    ]
    assert together == alone
    assert texts(batch_answers(model, prompts, 10, sampling=hot, seed=1)) != together
    assert (
        list(Session(*model).answer(prompts[0], max_new_tokens=10, stop_ids=(), sampling=hot)) == together[0]
    )


# ---- shapes -------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_into_few_lengths():
    tokens, padding = left_pad([np.array([5, 6]), np.array([7])], rows=3)
    assert tokens.shape == (3, 33)
    assert padding.tolist() == [31, 32, 33]
    assert tokens[0, 30:].tolist() == [0, 5, 6]
    assert tokens[1, 32] == 7
    sizes = {1: 33, 33: 33, 34: 65, 257: 257, 258: 321, 513: 513, 514: 769, 770: 1025}
    assert {n: bucket(n) for n in sizes} == sizes
    assert all(n <= bucket(n) for n in range(5000))
    assert len({bucket(n) for n in range(1, 4098)}) == 8 + 4 + 14


# ---- real models --------------------------------------------------------------------------------------------


def real_continuation(folder, reference):
    files = resolve_model(str(folder))
    spec = DecoderSpec.from_hf(files.config)
    model = Decoder(spec, dtype=jnp.float32), load_params(files, spec, "float32"), {}
    prompt = reference["texts"][0]["ids"]
    expected = reference["greedy_from_text0"][len(prompt) :]
    assert reference["greedy_from_text0"][: len(prompt)] == prompt
    streamed = list(Session(*model).answer(prompt, max_new_tokens=len(expected), stop_ids=()))
    # beside a shorter prompt, so that there is padding to go wrong
    batch = texts(batch_answers(model, [np.array(prompt), np.array(prompt[:3])], len(expected)))
    return expected, streamed, batch[0]


@pytest.mark.parametrize("name", ["stories260k-qwen2", "stories260k-mistral"])
def test_stories_go_on_as_in_torch(real, name):
    reference = json.loads((real / "fixtures/reference_logprobs_torch_f32.json").read_text())["stories260k"]
    expected, streamed, batch = real_continuation(real / "models" / name, reference)
    assert streamed == batch == expected


@pytest.mark.slow
def test_smollm2_goes_on_as_in_torch(real, smollm2):
    reference = json.loads((real / "fixtures/reference_logprobs_torch_f32.json").read_text())
    expected, streamed, batch = real_continuation(smollm2, reference["smollm2-135m-instruct"])
    assert streamed == batch == expected

"""Held-out prompts are answered as one by one, on any mesh, and compared word for word."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.core.errors import InputError
from jaxlora.core.tree import unflatten
from jaxlora.data.chat import ChatEncoder
from jaxlora.lora import tree as lora
from jaxlora.models.decoder import Decoder
from jaxlora.models.decoding import Session
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import param_shapes
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.sharding import tree_shardings
from jaxlora.training.answers import Answer, Answers, columns, lines, markdown, scores

SPEC = DecoderSpec(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-6,
    rope_theta=300.0,
    qkv_bias=True,
    tie_word_embeddings=True,
    sliding_window=None,
    max_position_embeddings=96,
)
SCALE, LONGEST = 0.5, 12


class Letters(ChatEncoder):
    """An encoder whose ids are letters: enough of a ChatEncoder to see what is asked and what comes back."""

    end_of_turn_ids = (5, 9)

    def __init__(self):  # without a tokenizer, and so without its parent's
        self.tokenizer = types.SimpleNamespace(
            decode=lambda ids, skip_special_tokens: "".join(chr(64 + i) for i in ids)
        )

    def encode_prompt(self, messages):
        text = "|".join(message["content"] for message in messages)
        return np.array([ord(letter) % 61 + 1 for letter in text], np.int32)


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3 + (path[-1] == "scale"), jnp.float32)

    base = unflatten({path: leaf(path, shape) for path, shape in param_shapes(SPEC).items()})
    adapter = lora.init(jax.random.key(0), base, {"q_proj": 2, "down_proj": 2})
    adapter = jax.tree.map(lambda x: x + 0.3, adapter)
    return Decoder(SPEC, remat="none", dtype=jnp.float32), base, adapter


def one_by_one(model, prompts):
    decoder, base, adapter = model
    session, encoder = Session(decoder, base, lora.scale(adapter, SCALE)), Letters()
    ids = (encoder.encode_prompt(p) for p in prompts)
    return [
        encoder.tokenizer.decode(
            session.answer(i, max_new_tokens=LONGEST, stop_ids=encoder.end_of_turn_ids), True
        )
        for i in ids
    ]


def answers(model, conversations, mesh, batch_size=4):
    decoder, base, adapter = model
    made = Answers(
        decoder, Letters(), conversations, max_new_tokens=LONGEST, batch_size=batch_size, mesh=mesh
    )
    base, adapter = (jax.device_put(tree, tree_shardings(mesh, tree)) for tree in (base, adapter))
    told = []
    return made, made.answer(lora.scale(adapter, SCALE), base, lambda *counts: told.append(counts)), told


QUESTIONS = ["a", "why is that so?", "hello", "x" * 50, "count", "more?"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_answers_are_those_of_one_prompt_after_the_other(model, shape):
    count = int(np.prod(shape))
    mesh = make_mesh(shape, jax.devices()[:count])
    expected = one_by_one(model, [conversation(q) for q in QUESTIONS])
    assert len(set(expected)) > 3
    # the reference of the even ones is right, with white space around it
    rows = [
        conversation(q, f" {text}\n" if i % 2 == 0 else "no")
        for i, (q, text) in enumerate(zip(QUESTIONS, expected, strict=True))
    ]
    made, found, told = answers(model, rows, mesh)
    assert [answer.text for answer in found] == expected
    assert [answer.prompt for answer in found] == QUESTIONS
    assert [answer.exact for answer in found] == [True, False] * 3
    scored = scores(found, ("nll", "exact_match", "answer_match", "answer_tokens", "ended"), r"####\s*(\S+)")
    assert scored == {  # no reference holds a value to match
        "eval/exact_match": 0.5,
        "eval/answer_tokens": np.mean([answer.tokens for answer in found]),
        "eval/ended": np.mean([answer.ended for answer in found]),
    }
    assert list(columns(found)) == ["prompt", "reference", "text", "exact", "tokens", "ended"]
    assert columns(found)["text"] == expected
    assert [answer.tokens for answer in found] == [len(text) for text in expected]
    assert [answer.ended for answer in found] == [len(text) < LONGEST for text in expected]
    assert told == [(4, 6), (6, 6)]
    assert made._program._cache_size() == 1


def test_the_last_assistant_turn_is_answered(model):
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    turns = conversation("first", "one", "second", "two", "never answered")
    _, (found,), _ = answers(model, [turns], mesh)
    assert (found.prompt, found.reference) == ("second", "two")
    assert found.text == one_by_one(model, [turns[:3]])[0]


def test_what_does_not_fit_is_left_out_or_refused(model):
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    fits, longer = conversation("x" * (96 - LONGEST), "y"), conversation("x" * (97 - LONGEST), "y")
    made, found, _ = answers(model, [longer, fits], mesh)
    assert (len(found), made.left_out) == (1, 1)
    with pytest.raises(InputError, match="none of the 1 held-out prompts leaves room"):
        answers(model, [longer], mesh)
    with pytest.raises(
        InputError, match=r"eval.max_new_tokens = 96 leaves no room .* the model has 96 positions"
    ):
        Answers(model[0], Letters(), [fits], max_new_tokens=96, batch_size=4, mesh=mesh)
    with pytest.raises(InputError, match="plain text and hold no question"):
        answers(model, ["a story"], mesh)


def test_what_is_shown_of_answers():
    given = [Answer(f"p{i}\n*q*", "right", "a" * 80, False, 80, False) for i in range(6)]
    assert lines(given, 2) == tuple(f'  "p{i} *q*" -> "{"a" * 59}…" (expected "right")' for i in range(2))
    text = markdown(given)
    first = ("**prompt**", "    p0\n    *q*", "**answer**", f"    {'a' * 80}", "**reference**", "    right")
    assert text.startswith("\n\n".join(first))
    assert text.count("**prompt**") == 4
